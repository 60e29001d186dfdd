"""Any sequence of calls leaves the memory tier in the state that a plain model of it is in."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier.tiers.memory import MemoryTier

SLOT_BYTES = 64
HASHES = [bytes([number]) * 16 for number in range(9)]
some_hashes = st.lists(st.sampled_from(HASHES), max_size=6)


def content(block_hash: bytes, ticket: int) -> bytes:
    """Return bytes that tell both the block and the reservation that they were written under."""
    return (block_hash + ticket.to_bytes(16, "big")) * 2


class MemoryMachine(RuleBasedStateMachine):
    """The model names blocks by their tickets and knows nothing of how slots are reused."""

    @initialize(slots=st.integers(1, 5))
    def begin(self, slots: int) -> None:
        self.tier = MemoryTier(slots * 4096, SLOT_BYTES)
        self.slots = slots
        self.filling: dict[int, bytes | None] = {}  # ticket -> hash, None once discarded
        self.ready: dict[bytes, int] = {}  # hash -> ticket
        self.idle: list[bytes] = []  # ready and not pinned, least recently used first
        self.pins: Counter[int] = Counter()  # slot -> pins
        self.contents: dict[int, bytes] = {}  # slot -> bytes of every block that is ready or pinned
        self.stale: list[int] = []

    def free(self) -> int:
        discarded = set(+self.pins) - {slot_of(ticket) for ticket in self.ready.values()}
        return self.slots - len(self.filling) - len(self.ready) - len(discarded)

    @rule(hashes=some_hashes)
    def reserve(self, hashes: list[bytes]) -> None:
        asked = [block_hash for block_hash in dict.fromkeys(hashes) if block_hash in self.idle]
        candidates = [block_hash for block_hash in self.idle if block_hash not in asked]
        tickets = self.tier.reserve(hashes)
        assert len(tickets) == len(hashes)
        for block_hash, ticket in zip(hashes, tickets, strict=True):
            if block_hash in self.ready or block_hash in self.filling.values():
                assert ticket is None
                continue
            if self.free() == 0 and not candidates:
                assert ticket is None
                continue
            if self.free() == 0:
                victim = candidates.pop(0)
                del self.contents[slot_of(self.ready.pop(victim))]
                self.idle.remove(victim)
            assert ticket is not None
            assert 0 <= slot_of(ticket) < self.slots
            assert slot_of(ticket) not in {slot_of(other) for other in self.filling}
            assert slot_of(ticket) not in self.contents, "a slot in use was handed out"
            assert ticket not in self.stale
            self.filling[ticket] = block_hash
            self.tier.view(slot_of(ticket))[:] = content(block_hash, ticket)
        self.idle = candidates + asked[::-1]

    @rule(data=st.data(), pin=st.booleans())
    def publish(self, data: st.DataObject, pin: bool) -> None:
        tickets = data.draw(st.lists(st.sampled_from([*self.filling, *self.stale, 0]), max_size=4))
        fresh = []
        expected = []
        for ticket in tickets:
            block_hash = self.filling.pop(ticket, None)
            expected.append(block_hash is not None)
            self.stale.append(ticket)
            if block_hash is None:
                continue
            self.ready[block_hash] = ticket
            self.contents[slot_of(ticket)] = content(block_hash, ticket)
            if pin:
                self.pins[slot_of(ticket)] += 1
            else:
                fresh.append(block_hash)
        self.idle += fresh[::-1]
        assert self.tier.publish(tickets, pin) == expected

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        tickets = data.draw(st.lists(st.sampled_from([*self.filling, *self.stale, 0]), max_size=3))
        self.tier.abort(tickets)
        for ticket in tickets:
            self.filling.pop(ticket, None)
            self.stale.append(ticket)

    @rule(hashes=some_hashes)
    def acquire(self, hashes: list[bytes]) -> None:
        expected = []
        for block_hash in hashes:
            if block_hash not in self.ready:
                break
            expected.append(slot_of(self.ready[block_hash]))
            if block_hash in self.idle:
                self.idle.remove(block_hash)
        assert self.tier.match(hashes) == len(expected)
        assert self.tier.acquire(hashes) == expected
        self.pins.update(expected)

    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        held = sorted(self.pins.elements())
        slots = data.draw(st.permutations(held))[: data.draw(st.integers(0, len(held)))]
        self.tier.unpin(slots)
        findable = {slot_of(ticket): block_hash for block_hash, ticket in self.ready.items()}
        released = []
        for slot in slots:
            self.pins[slot] -= 1
            if self.pins[slot] == 0:
                released.append(slot)
        for slot in released[::-1]:
            if slot in findable:
                self.idle.append(findable[slot])
            else:
                del self.contents[slot]

    @rule(hashes=some_hashes)
    def discard(self, hashes: list[bytes]) -> None:
        self.tier.discard(hashes)
        for block_hash in hashes:
            ticket = self.ready.pop(block_hash, None)
            if ticket is not None and block_hash in self.idle:
                self.idle.remove(block_hash)
                del self.contents[slot_of(ticket)]
            for filling, other in self.filling.items():
                if other == block_hash:
                    self.filling[filling] = None

    @invariant()
    def blocks_are_as_they_were_published(self) -> None:
        for slot, expected in self.contents.items():
            assert self.tier.view(slot) == expected

    @invariant()
    def states_agree(self) -> None:
        for block_hash in HASHES:
            filling = block_hash in self.filling.values()
            expected = "ready" if block_hash in self.ready else "filling" if filling else "absent"
            assert self.tier.state(block_hash) == expected

    @invariant()
    def counts_add_up(self) -> None:
        stats = self.tier.stats()
        assert stats["blocks"] == len(self.ready)
        assert stats["filling"] == len(self.filling)
        assert stats["pinned"] == len(+self.pins)
        assert stats["free"] == self.free()
        assert stats["misuse"] == 0

    def teardown(self) -> None:
        if hasattr(self, "tier"):
            self.tier.close()


def slot_of(ticket: int) -> int:
    return ticket & 0xFFFFFFFF


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
