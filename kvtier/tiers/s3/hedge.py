"""When a request is slow enough to be asked a second time, and how often that may be done."""

from __future__ import annotations

import threading
from collections import deque

from kvtier.tiers.s3.bucket import SLOWEST_BYTES_PER_SECOND

_SAMPLES = 256
_FEWEST_SAMPLES = 32
_QUANTILE = 0.95
_FACTOR = 1.5
_SHORTEST_DELAY = 0.02
"""Below this, a second request costs more than the wait for the first."""
_SHARE = 0.05
_SAVED_UP = 4.0
_PATIENCE = 0.5
"""A healthy body does not rest for so long; a lost packet is sent again sooner."""


class Hedges:
    """Watches how long first bytes take, and grants second requests for the slowest few. Thread-safe.

    The delay is half again the 95th percentile of the last 256 requests; at most one request in twenty is
    made twice, however slow the bucket gets: a bucket that is slow for all must not get more to do.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: deque[float] = deque(maxlen=_SAMPLES)
        self._reports = 0
        self._delay: float | None = None
        self._allowance = 0.0

    def delay(self) -> float | None:
        """Return the seconds after which a request counts as slow; None while too little is known."""
        return self._delay

    def patience(self) -> float:
        """Return the seconds of waiting after which a body is judged; longer where first bytes are slow."""
        return max(_PATIENCE, self._delay or 0.0)

    def report(self, seconds: float) -> None:
        """Report how long the first byte of a reply took."""
        with self._lock:
            self._times.append(seconds)
            self._reports += 1
            self._allowance = min(self._allowance + _SHARE, _SAVED_UP)
            if self._reports % _FEWEST_SAMPLES == 0:
                slow = sorted(self._times)[int(len(self._times) * _QUANTILE)]
                self._delay = max(_SHORTEST_DELAY, slow * _FACTOR)

    def take(self) -> bool:
        """Ask for a second request; False when the share is used up."""
        with self._lock:
            if self._allowance < 1.0:
                return False
            self._allowance -= 1.0
            return True


class Pace:
    """Watches one body: has it come more slowly than a request may be, for as long as patience lasts?

    Only time spent waiting for bytes counts, not what is done with them in between. Not thread-safe.
    """

    def __init__(self, patience: float):
        """Begin to watch; `patience` in seconds."""
        self._patience = patience
        self._waited = 0.0
        self._bytes = 0
        self.silent = 0.0
        """Seconds since the last byte came."""

    def left(self) -> float:
        """Return the seconds that the next wait may take until there is something to decide."""
        return self._patience - self._waited

    def is_slow(self, seconds: float, count: int) -> bool:
        """Report a wait that brought `count` bytes; say whether the body deserves no more patience."""
        self.silent = 0.0 if count else self.silent + seconds
        self._waited += seconds
        self._bytes += count
        if self._waited < self._patience:
            return False
        slow = self._bytes < self._patience * SLOWEST_BYTES_PER_SECOND
        self._waited, self._bytes = 0.0, 0
        return slow
