"""The gate: how long a lookup may wait for blocks that are on their way."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

_READS = 5
_DRIFT = 1.05
# Passes over fewer tokens are bound by other things than the tokens they compute.
_PREFILL_TOKENS = 256
# 0 would mean that the cost is not known.
_NEXT_TO_NOTHING = 1e-9


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


class ComputePace:
    """How fast an engine computes prompts, seen from its passes: what loading has to beat.

    Passes follow each other at once while there is work, so the time from one to the next, divided by the
    tokens of the first, is what a token costs. Passes over few tokens tell what any pass takes. Gaps without
    work make both look slower than they are; the lowest value counts, and drifts up slowly when it is not
    seen again.
    """

    def __init__(self) -> None:
        self._cost: float | None = None
        self._least: float | None = None
        self._begun = 0.0
        self._tokens = 0

    def begins(self, tokens: int, now: float) -> None:
        """Note that a pass over `tokens` tokens begins, at `now` seconds on a monotonic clock."""
        took = now - self._begun
        if self._tokens >= _PREFILL_TOKENS:
            self._cost = _lower(took / self._tokens, self._cost)
        elif self._tokens:
            self._least = _lower(took, self._least)
        self._begun, self._tokens = now, tokens

    def block_cost(self, tokens_per_block: int, alone: int = 0) -> float | None:
        """Return how many seconds a block takes, None before any prompt was computed.

        Args:
            tokens_per_block: Tokens in a block.
            alone: The blocks of a prompt beside which the engine does nothing: without them there is a pass
                all the same, so they cost only what they take beyond that. 0: others keep it busy anyway.
        """
        if self._cost is None:
            return None
        cost = self._cost * tokens_per_block
        if alone and self._least is not None:
            cost = max(cost - self._least / alone, _NEXT_TO_NOTHING)
        return cost


def _lower(seen: float, known: float | None) -> float:
    return seen if known is None else min(seen, known * _DRIFT)
