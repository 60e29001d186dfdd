"""Which LoRA adapters an engine's ids stand for: ids are its own, another engine's 1 is another adapter."""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import Future
from functools import partial

from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.connector.weights import adapter_digest

_log = logging.getLogger(__name__)


class Adapters:
    """Names adapters by the content of their files, which are read once, in the background.

    The engine loads an adapter when its id is first used, and keeps it for as long as it uses the id: so the
    files as they are at that time are what counts, and a second path for the same id makes it useless.
    """

    def __init__(self) -> None:
        self._private = secrets.token_hex(16)
        self._reader = Workers("adapter", 1)
        self._paths: dict[int, str] = {}
        self._digests: dict[int, Future[str]] = {}
        self._ambiguous: set[int] = set()

    def name(self, lora_id: int, path: str | None) -> str | None:
        """Return a name that stands for an adapter's content.

        Args:
            lora_id: The engine's id.
            path: Its file or directory; None where the engine does not tell (V1 tells it at allocation, not
                in lookups). An id whose path was told once needs none.

        Returns:
            The same name for the same content in every process; where there is no path, or it cannot be read,
            one that only this object gives. None as long as the files are being read, and for an id that
            was used with two paths.
        """
        if path is not None and self._paths.setdefault(lora_id, path) != path:
            self._ambiguous.add(lora_id)
        if lora_id in self._ambiguous:
            log_once(_log, "ambiguous", "a LoRA id is used for two adapters: their requests are not cached")
            return None
        if lora_id not in self._paths:
            return f"{self._private}-{lora_id}"
        digest = self._digests.get(lora_id)
        if digest is None:
            reading = partial(adapter_digest, self._paths[lora_id])
            digest = self._digests[lora_id] = self._reader.submit(reading)
        if not digest.done():
            return None
        error = digest.exception()
        if error is None:
            return digest.result()
        log_once(_log, "unreadable", "a LoRA adapter cannot be read, its KV stays private: %r", error)
        return f"{self._private}-{lora_id}"
