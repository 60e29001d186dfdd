"""Writing an object unless it is there, on servers that can tell and on those that cannot."""

from __future__ import annotations

from collections.abc import Callable

from kvtier.tiers.s3.replies import PutRefused


class ConditionalPut:
    """Puts with `If-None-Match: *`, until a server turns out not to know it."""

    def __init__(self, put: Callable[[str, bytes, bool], None]):
        """Wrap a PUT.

        Args:
            put: Writes body to key, on the condition or without; raises `PutRefused`.
        """
        self._put = put
        self.supported = True
        """False once the server has refused the condition and taken the same PUT without."""

    def __call__(self, key: str, body: bytes) -> bool:
        """Write; False if the object is there already, or just being written by somebody else."""
        if self.supported:
            try:
                self._put(key, body, True)
                return True
            except PutRefused as refusal:
                if refusal.exists:
                    return False
        # The server may not know the header; it is to blame only if the same PUT works without.
        self._put(key, body, False)
        self.supported = False
        return True
