"""A circuit breaker: stop asking a bucket that does not answer, and find out by itself when it does again."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable

_FAILURES_TO_OPEN = 3
_WINDOW = 40
_FEWEST_OUTCOMES = 16
_WORST_SHARE = 0.5
_FIRST_PAUSE = 0.5


class Breaker:
    """Opens after three failures in a row, or when half of the last 40 requests failed; then probes.

    It lets one probe through after each pause.

    The pause starts at half a second, doubles with each failed probe up to `longest`, and is jittered so
    that the nodes of a cluster do not come back all at once. Thread-safe.
    """

    def __init__(
        self,
        longest: float = 30.0,
        on_open: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ):
        """Make a closed breaker.

        Args:
            longest: Longest pause in seconds; also the pause after a refusal (`failure(denied=True)`).
            on_open: Called when the breaker opens, so that somebody comes for the probe.
            clock: Monotonic seconds.
            jitter: Numbers from 0 to 1; the pause varies by up to a quarter.
        """
        self._longest = longest
        self._on_open = on_open
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.Lock()
        self._failures = 0
        self._outcomes: deque[bool] = deque(maxlen=_WINDOW)
        self._pause = 0.0
        self._probe_at: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether ordinary requests must not be made. Costs no lock: lookups ask it."""
        return self._probe_at is not None

    def try_enter(self) -> bool:
        """Ask for permission to make a request: always granted when closed, to one probe per pause when open.

        Whoever got it reports `success` or `failure`.
        """
        with self._lock:
            if self._probe_at is None:
                return True
            now = self._clock()
            if now < self._probe_at:
                return False
            # Should this probe never report back, the next one is still due a pause later.
            self._probe_at = now + self._pause
            self._probing = True
            return True

    def wait_seconds(self) -> float:
        """Return the seconds until `try_enter` may be granted; 0 when closed."""
        with self._lock:
            return 0.0 if self._probe_at is None else max(0.0, self._probe_at - self._clock())

    def success(self) -> None:
        """Report that the bucket answered: the breaker closes."""
        with self._lock:
            self._failures = 0
            if self._probe_at is not None:
                # What failed before the outage ended says nothing about what comes now.
                self._outcomes.clear()
            self._outcomes.append(True)
            self._probe_at = None
            self._probing = False

    def failure(self, *, denied: bool = False, pause: float | None = None) -> None:
        """Report a failed request.

        Args:
            denied: Trying again soon will not help.
            pause: Seconds for which the bucket wants to be left alone.
        """
        with self._lock:
            self._failures += 1
            self._outcomes.append(False)
            if self._probing:
                self._pause = min(self._pause * 2, self._longest)
            elif self._probe_at is not None:
                # The late end of a request that began before the breaker opened.
                return
            elif not denied and pause is None and not self._is_bad():
                return
            else:
                self._pause = min(_FIRST_PAUSE, self._longest)
            if denied:
                self._pause = self._longest
            wait = self._pause * (1 - self._jitter() / 4)
            if pause is not None:
                # No sooner than asked for, and not all nodes at once.
                wait = max(wait, min(pause, self._longest) * (1 + self._jitter() / 4))
            self._probing = False
            self._probe_at = self._clock() + wait
        self._on_open()

    def _is_bad(self) -> bool:
        failed = self._outcomes.count(False)
        return self._failures >= _FAILURES_TO_OPEN or (
            len(self._outcomes) >= _FEWEST_OUTCOMES and failed >= _WORST_SHARE * len(self._outcomes)
        )
