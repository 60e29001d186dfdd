"""The credentials at hand: looked up and renewed beside the requests that they sign."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from kvtier.tiers.s3.aside import Aside, outcome

_SPARE_SECONDS = 30.0
"""Credentials that expire sooner are not used any more."""
_PAUSE_SECONDS = 5.0
"""Between attempts to renew what is still good."""
_THREADS = 2


class KeyRing:
    """Gives credentials; only who cannot do without new ones waits for them. Thread-safe."""

    def __init__(self, open_source: Callable[[], Any]):
        """Prepare; nothing is looked up yet.

        Args:
            open_source: Finds out where credentials come from, and returns what has botocore's
                `get_frozen_credentials()`, and `refresh_needed(seconds)` if they expire; None for none.
                Both may block for as long as they please.
        """
        self._open_source = open_source
        self._aside = Aside("s3-keys", _THREADS)
        self._lock = threading.Lock()
        self._source: Any = None
        self._keys: Any = None
        self._looking: Future[Any] | None = None
        self._again_at = 0.0

    async def get(self, seconds: float) -> Any:
        """Return credentials as botocore freezes them, None if there are none.

        They are renewed when their source says so, and meanwhile used for as long as they are good.

        Args:
            seconds: How long to wait for new ones.

        Raises:
            BucketTimeout: They do not come in time.
            TierError: They cannot be had; also what botocore raises.
        """
        with self._lock:
            self._take_over()
            needed = self._keys is None or self._expires(_SPARE_SECONDS)
            wanted = needed or (self._expires(None) and time.monotonic() >= self._again_at)
            if wanted and self._looking is None:
                self._looking = self._aside.begin(partial(_look_up, self._source, self._open_source))
            keys, looking = self._keys, self._looking
        if looking is None or not needed:
            return keys
        _, keys = await outcome(looking, seconds, "the source of the credentials")
        return keys

    def forget(self) -> None:
        """Begin anew for the next request, with the source as well: the server calls what it gave expired."""
        with self._lock:
            self._source = self._keys = self._looking = None

    def close(self) -> None:
        """Look nothing up any more."""
        self._aside.close()

    def _expires(self, seconds: float | None) -> bool:
        """Whether what is at hand expires within so many seconds; None for as many as its source likes."""
        refresh_needed = getattr(self._source, "refresh_needed", None)
        return refresh_needed is not None and bool(refresh_needed(seconds))

    def _take_over(self) -> None:
        """Use from now on what a look-up has brought that has ended; the lock is held."""
        looking = self._looking
        if looking is None or not looking.done():
            return
        self._looking = None
        self._again_at = time.monotonic() + _PAUSE_SECONDS
        if not looking.cancelled() and looking.exception() is None:
            self._source, self._keys = looking.result()


def _look_up(source: Any, open_source: Callable[[], Any]) -> tuple[Any, Any]:
    source = source or open_source()
    return source, source and source.get_frozen_credentials()
