"""Leases: claims on resident slots, from promise to the end of the copy; unused ones expire by themselves."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtier.tiers.memory import MemoryTier


@dataclass(slots=True)
class _Lease:
    slots: Sequence[int]
    expires: float
    holders: set[int]
    owner: int


class LeaseTable:
    """Who may read which pinned slots, and until when.

    Args:
        memory: The arena whose pins the leases stand for.
        seconds: Term of a lease that is not held.
        clock: Monotonic seconds.
    """

    def __init__(self, memory: MemoryTier, seconds: float, clock: Callable[[], float]) -> None:
        self._memory = memory
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        # The first entry is always the next to expire.
        self._leases: dict[int, _Lease] = {}
        self._held: dict[int, _Lease] = {}
        self._ids = itertools.count(1)
        self.expired = 0

    def __len__(self) -> int:
        return len(self._leases) + len(self._held)

    def grant(self, slots: Sequence[int], holders: int, owner: int = 0) -> int:
        """Take over one pin on each of `slots` and return the lease that answers for them.

        Args:
            slots: Pinned slots.
            holders: How many ranks hold the lease; it ends when each of them has released it.
            owner: Who alone can hold and release it, and for whom `end_all` ends it.
        """
        with self._lock:
            lease = next(self._ids)
            expires = self._clock() + self._seconds
            self._leases[lease] = _Lease(slots, expires, set(range(holders)), owner)
        return lease

    def hold(self, lease: int, owner: int = 0) -> bool:
        """Let a lease last until it is released; False when it has ended, or is another owner's."""
        with self._lock:
            entry = self._leases.get(lease) or self._held.get(lease)
            if entry is None or entry.owner != owner:
                return False
            if lease in self._held:
                return True
            del self._leases[lease]
            if entry.expires <= self._clock():
                self._end(entry)
                self.expired += 1
                return False
            self._held[lease] = entry
            return True

    def release(self, lease: int, shard: int | None = None, owner: int = 0) -> None:
        """End one shard's hold, or (None) the lease; unknown ones and other owners' are ignored."""
        with self._lock:
            table = self._held if lease in self._held else self._leases
            entry = table.get(lease)
            if entry is None or entry.owner != owner:
                return
            if shard is not None:
                entry.holders.discard(shard)
                if entry.holders:
                    return
            del table[lease]
            self._end(entry)

    def end_all(self, owner: int) -> None:
        """End every lease of one owner."""
        with self._lock:
            for table in (self._leases, self._held):
                for lease in [lease for lease, entry in table.items() if entry.owner == owner]:
                    self._end(table.pop(lease))

    def expire(self) -> None:
        """End every lease whose term is over."""
        if not self._leases:
            return
        with self._lock:
            now = self._clock()
            while self._leases:
                lease, entry = next(iter(self._leases.items()))
                if entry.expires > now:
                    return
                del self._leases[lease]
                self._end(entry)
                self.expired += 1

    def _end(self, entry: _Lease) -> None:
        self._memory.unpin(entry.slots)
