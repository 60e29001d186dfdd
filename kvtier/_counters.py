"""Named counters that many threads add to."""

from __future__ import annotations

import threading


class Counters:
    """A dictionary of sums; `snapshot` gives a copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, int | float] = {}

    def add(self, name: str, amount: int | float = 1) -> None:
        """Add `amount` to the counter `name`, which starts at 0."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    def snapshot(self) -> dict[str, int | float]:
        """Return the present sums."""
        with self._lock:
            return dict(self._values)
