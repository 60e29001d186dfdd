"""The gate: how long a lookup may wait for blocks that are on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

_READS = 5


class Pace:
    """How fast a tier delivers: medians over its last few reads, so one that hung does not count for long."""

    def __init__(self) -> None:
        self._reads: deque[tuple[float, float]] = deque(maxlen=_READS)
        self._first = self._block = 0.0

    def saw(self, blocks: int, first: float, last: float) -> None:
        """Take in a read that delivered `blocks` blocks, the first and the last after so many seconds."""
        each = (last - first) / (blocks - 1) if blocks > 1 else self._block
        self._reads.append((first, each))
        self._first, self._block = (median(column) for column in zip(*self._reads, strict=True))

    def arrival(self, place: int) -> float:
        """Return how many seconds after the order of a read its block number `place` is expected."""
        return self._first + place * self._block


def patience(arrivals: Sequence[float], wait: float, block_cost: float | None) -> float:
    """Return how many seconds waiting for a run of blocks is worth.

    Waiting until block `n` arrives saves computing `n` blocks. The best such moment is chosen, and for
    arrivals are guesses, up to half of what it gains is added. It is 0 if computing wins over all of them, or
    nothing comes in time.

    Args:
        arrivals: When each block of the run is expected, in seconds from now, in order.
        wait: Seconds that the caller waits at most.
        block_cost: Seconds that the engine takes to compute a block, None if that is not known: then it is
            worth waiting for whatever comes in time.
    """
    best = saved = 0.0
    for count, arrival in enumerate(arrivals, 1):
        if arrival > wait:
            break
        if block_cost is None:
            return wait
        if count * block_cost - arrival > saved:
            best, saved = max(arrival, 0.0), count * block_cost - arrival
    return min(wait, best + saved / 2)
