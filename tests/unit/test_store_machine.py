"""The store as a state machine: reserve, commit, evict, lease, expire, corrupt, crash, in any order."""

from __future__ import annotations

import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvtier.layout import BlockLayout
from kvtier.store import ticket_slot
from kvtier.store.tiered import LEASE_SECONDS
from tests.store_support import ROOT, DictTier, chain, content, make_store, read

TWO_SHARDS = BlockLayout("bfloat16", tokens_per_block=4, layers=2, kv_factor=2, row_elements=64, shards=2)

SLOTS = 6
PROMPTS = [chain(5, seed) for seed in range(3)]
PATIENT = 20.0

prompts = st.sampled_from(PROMPTS)
choices = st.integers(0, 1 << 16)
lengths = st.integers(1, 5)


def picked(things, choice):
    """Pick one: how many there are depends on threads of the store, which a strategy must not."""
    return sorted(things)[choice % len(things)]


class StoreMachine(RuleBasedStateMachine):
    """Whatever happens, a leased slot holds exactly its block, and nothing leaks."""

    @initialize()
    def open(self):
        self.disk, self.s3 = DictTier("disk"), DictTier("s3")
        self.now = 0.0
        self.start()

    def start(self):
        tiers = [self.disk, self.s3]
        self.store = make_store(tiers, slots=SLOTS, layout=TWO_SHARDS, clock=lambda: self.now)
        self.leases: dict[int, tuple[float, list[bytes], tuple[int, ...]]] = {}
        # Of each reservation the block, and the shards that may write to its slot.
        self.tickets: dict[int, tuple[bytes, set[int]]] = {}

    def settle(self, first, second, end):
        """Let one shard's copy of one block end."""
        if not self.tickets:
            return
        ticket = picked(self.tickets, first)
        block, writing = self.tickets[ticket]
        shard = picked(writing, second)
        writing.remove(shard)
        if not writing:
            del self.tickets[ticket]
        end(block, ticket, shard)

    def write(self, block, ticket, shard):
        size = TWO_SHARDS.shard_bytes
        rows = content(block, TWO_SHARDS.block_bytes)[shard * size : (shard + 1) * size]
        self.store.slot_view(ticket_slot(ticket), shard)[:] = rows

    def alive(self):
        return {lease: entry for lease, entry in self.leases.items() if self.now - entry[0] < LEASE_SECONDS}

    @rule(prompt=prompts, length=lengths)
    def reserve(self, prompt, length):
        for block, ticket in zip(prompt, self.store.reserve(ROOT, 0, prompt[:length]), strict=False):
            if ticket is not None:
                assert ticket not in self.tickets
                self.tickets[ticket] = (block, {0, 1})
        # A reserved slot is nobody else's, and none that is leased.
        slots = [ticket_slot(ticket) for ticket in self.tickets]
        assert len(set(slots)) == len(slots)
        leased = {slot for _, _, held in self.alive().values() for slot in held}
        assert not leased.intersection(slots)

    @rule()
    def fill_and_commit(self):
        for ticket, (block, writing) in self.tickets.items():
            for shard in writing:
                self.write(block, ticket, shard)
                self.store.commit([ticket], shard)
        self.tickets.clear()

    @rule(first=choices, second=choices)
    def one_shard_is_ready(self, first, second):
        def end(block, ticket, shard):
            self.write(block, ticket, shard)
            self.store.commit([ticket], shard)

        self.settle(first, second, end)

    @rule(first=choices, second=choices)
    def one_shard_fails(self, first, second):
        self.settle(first, second, lambda block, ticket, shard: self.store.abort([ticket], shard))

    @rule()
    def shards_that_were_stopped_write(self):
        for ticket, (_, writing) in self.tickets.items():
            for shard in writing:
                self.store.slot_view(ticket_slot(ticket), shard)[:] = bytes(TWO_SHARDS.shard_bytes)

    @rule()
    def abort(self):
        unordered = [ticket for ticket, (_, writing) in self.tickets.items() if len(writing) == 2]
        self.store.abort(unordered)
        for ticket in unordered:
            del self.tickets[ticket]

    @rule(prompt=prompts, length=lengths, wait=st.sampled_from([0, PATIENT]))
    def match(self, prompt, length, wait):
        match = self.store.match(prompt[:length], wait=wait)
        assert len(match.slots) <= length
        assert sum(match.sources.values()) == len(match.slots)
        if match.lease:
            self.leases[match.lease] = (self.now, prompt[: len(match.slots)], match.slots)

    @rule(which=choices)
    def release(self, which):
        if self.leases:
            lease = picked(self.leases, which)
            self.store.release(lease)
            del self.leases[lease]

    @rule(seconds=st.sampled_from([1.0, 30.0, LEASE_SECONDS + 1]))
    def time_passes(self, seconds):
        self.now += seconds

    @rule(which=choices)
    def hold(self, which):
        if self.leases:
            lease = picked(self.leases, which)
            granted, hashes, slots = self.leases[lease]
            if self.store.hold(lease):
                assert self.now - granted < LEASE_SECONDS
                self.leases[lease] = (math.inf, hashes, slots)
            else:
                assert self.now - granted >= LEASE_SECONDS
                del self.leases[lease]

    @rule(which=choices, tier=st.sampled_from(["disk", "s3"]), position=st.integers(0, 1 << 20))
    def flip_a_byte_below(self, which, tier, position):
        blocks = getattr(self, tier).blocks
        if blocks:
            block = picked(blocks, which)
            damaged = bytearray(blocks[block])
            damaged[position % len(damaged)] ^= 0x40
            blocks[block] = bytes(damaged)

    @rule(which=choices, tier=st.sampled_from(["disk", "s3"]))
    def lose_a_block_below(self, which, tier):
        blocks = getattr(self, tier).blocks
        if blocks:
            getattr(self, tier).lost = {picked(blocks, which)}

    @rule(flush=st.booleans())
    def crash_and_restart(self, flush):
        if flush:
            assert self.store.flush(PATIENT)
        self.disk.lost, self.s3.lost = set(), set()
        self.start()

    @invariant()
    def leased_slots_hold_their_blocks(self):
        for _, hashes, slots in self.alive().values():
            assert read(self.store, slots) == [content(block, TWO_SHARDS.block_bytes) for block in hashes]

    @invariant()
    def nothing_leaks(self):
        assert self.store.stats()["filling_slots"] == len(self.tickets)

    def teardown(self):
        for lease in list(self.leases):
            self.store.release(lease)
        for ticket, (_, writing) in self.tickets.items():
            for shard in writing:
                self.store.abort([ticket], shard)
        assert self.store.flush(PATIENT)
        stats = self.store.stats()
        assert (stats["leases"], stats["filling_slots"], stats["memory_pinned"]) == (0, 0, 0)
        self.store.close(5)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
