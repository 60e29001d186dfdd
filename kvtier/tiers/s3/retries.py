"""Asking again: what is worth it, after how long, and how often a struggling bucket is asked again at all."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from kvtier.errors import TierUnavailable
from kvtier.tiers.s3.bucket import BucketThrottled, BucketTimeout, ConnectionLost, Parts

_MAX_RETRIES = 2
_FIRST_PAUSE = 0.1
_EARNED = 0.1
_SAVED_UP = 10.0


class Retries:
    """A budget of second attempts, earned by requests that succeed: one for ten of them. Thread-safe.

    When a bucket is ill all requests fail at once; retries without a budget would multiply its load then.
    """

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, jitter: Callable[[], float] = random.random
    ):
        """Begin with a full budget of ten.

        Args:
            sleep: Waits for seconds.
            jitter: Numbers from 0 to 1; a pause is between half of it and all of it.
        """
        self._sleep = sleep
        self._jitter = jitter
        self._lock = threading.Lock()
        self._budget = _SAVED_UP

    def receive(self, receive: Callable[[], None], into: Parts, left: Callable[[], float]) -> int:
        """Receive a body; if that fails for a reason that may pass, ask again for what is left of it.

        A connection that breaks off is replaced at once; a bucket that asks for patience (503, 5xx) gets it,
        as long as it says (Retry-After) if that is within the time left. A time-out has used its time up.

        Args:
            receive: Asks for the bytes that are left, and receives them.
            into: Where to.
            left: Tells the seconds that are left for all attempts.

        Returns:
            How many further attempts it took.
        """
        for attempt in range(_MAX_RETRIES + 1):
            try:
                receive()
            except TierUnavailable as error:
                self._sleep(self.pause(error, attempt, into, left()))
            else:
                self.succeeded()
                return attempt
        raise AssertionError("unreachable")

    def pause(self, error: TierUnavailable, attempt: int, into: Parts, left: float) -> float:
        """Say how many seconds to wait before asking again; where it is not worth it, raise `error`.

        Args:
            error: How the last attempt ended.
            attempt: Which one it was, from 0.
            into: What it was to fill.
            left: Seconds that are left for all attempts.
        """
        pause = self._pause(error, attempt)
        if not into.left or pause is None or pause >= left or not self._take():
            raise error
        return pause

    def succeeded(self) -> None:
        """Earn a part of a second attempt."""
        with self._lock:
            self._budget = min(self._budget + _EARNED, _SAVED_UP)

    def _pause(self, error: TierUnavailable, attempt: int) -> float | None:
        if attempt == _MAX_RETRIES or isinstance(error, BucketTimeout):
            return None
        if isinstance(error, ConnectionLost):
            # The same place again and again is no accident.
            return 0.0 if attempt == 0 else None
        asked = error.retry_after if isinstance(error, BucketThrottled) else None
        return max(asked or 0.0, float(_FIRST_PAUSE * 2**attempt) * (1 + self._jitter()) / 2)

    def _take(self) -> bool:
        with self._lock:
            if self._budget < 1.0:
                return False
            self._budget -= 1.0
            return True
