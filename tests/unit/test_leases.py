"""Leases that nobody held in time are over, whether or not anybody has looked since."""

from __future__ import annotations

from kvtier.store.leases import LeaseTable
from kvtier.tiers.memory import MemoryTier


def test_a_lease_cannot_be_held_when_its_term_is_over():
    now = [0.0]
    memory = MemoryTier(4 * 4096, 4096)
    memory.publish([ticket for ticket in memory.reserve([b"a" * 16, b"b" * 16]) if ticket is not None])
    leases = LeaseTable(memory, 60.0, lambda: now[0])
    late, timely = (leases.grant(memory.acquire([block]), 1) for block in (b"a" * 16, b"b" * 16))
    assert leases.hold(timely)
    now[0] = 60.0
    assert not leases.hold(late)
    assert leases.hold(timely)
    assert (memory.stats()["pinned"], leases.expired) == (1, 1)
    leases.release(timely)
    assert memory.stats()["pinned"] == 0
    memory.close()
