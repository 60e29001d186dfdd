"""Keeping background transfers below a rate."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Says how long to rest after so many bytes. Not thread-safe."""

    def __init__(self, bytes_per_second: float | None, clock: Callable[[], float] = time.monotonic):
        """Begin now; None means as fast as it goes."""
        self._rate = bytes_per_second
        self._clock = clock
        self._due = clock()

    def rest(self, size: int) -> float:
        """Count `size` bytes as transferred, and return the seconds to wait before the next."""
        if self._rate is None:
            return 0.0
        # Time that was not used is not saved up: that would be a burst later.
        now = self._clock()
        self._due = max(self._due + size / self._rate, now)
        return self._due - now
