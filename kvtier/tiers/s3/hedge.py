"""When a request is slow enough to be asked a second time, and how often that may be done."""

from __future__ import annotations

import threading
from collections import deque

_SAMPLES = 256
_FEWEST_SAMPLES = 32
_QUANTILE = 0.95
_FACTOR = 1.5
_SHORTEST_DELAY = 0.02
"""Below this, a second request costs more than the wait for the first."""
_SHARE = 0.05
_SAVED_UP = 4.0


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
