"""How namespaces share the agent's memory: pages, slots that come and go, equal shares."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.agent.pages import PagePool
from kvtier.agent.stores import WARM_SECONDS, Stores
from kvtier.errors import ConfigError
from kvtier.layout import BlockLayout
from kvtier.store import ticket_slot
from kvtier.tiers.arena import MappedMemory
from kvtier.tiers.memory import MemoryTier
from tests.agent_support import eventually, namespace_of
from tests.store_support import LAYOUT, ROOT, DictTier, chain, content, read, save

WIDE = BlockLayout("bfloat16", tokens_per_block=4, layers=20, kv_factor=2, row_elements=512)
"""Blocks of ten pages."""


class TestPagePool:
    def test_takes_the_lowest_pages_first(self):
        pool = PagePool(10)
        assert pool.take(3, 2) == [0, 3]
        assert pool.take(2, 9) == [6, 8]
        assert pool.free == 0
        assert pool.take(1, 1) == []

    def test_neighbours_are_one_stretch_again(self):
        pool = PagePool(12)
        ones = pool.take(1, 12)
        random.Random(1).shuffle(ones)
        for one in ones:
            pool.give([one], 1)
        assert pool.take(12, 1) == [0]

    def test_no_page_is_given_out_twice(self):
        rng = random.Random(7)
        pool, held = PagePool(200), {}
        for _ in range(500):
            size = rng.choice([1, 2, 3, 7])
            if held and rng.random() < 0.5:
                start = rng.choice(list(held))
                pool.give([start], held.pop(start))
            else:
                for start in pool.take(size, rng.randrange(5)):
                    held[start] = size
            pages = [page for start, size in held.items() for page in range(start, start + size)]
            assert len(pages) == len(set(pages))
            assert pool.free == 200 - len(pages)


class SharedMemoryMachine(RuleBasedStateMachine):
    """A memory tier whose slots come and go, against a model of who uses which."""

    def __init__(self):
        super().__init__()
        self.memory = MappedMemory.anonymous(20 * 4096)
        self.tier = MemoryTier.within(self.memory, 4096)
        self.outside = set(range(20))
        self.pins: list[int] = []
        self.tickets: list[int] = []
        self.number = 0

    def teardown(self):
        self.tier.close()
        self.memory.close()

    @rule(count=st.integers(1, 8))
    def grow(self, count):
        slots = sorted(self.outside)[:count]
        self.outside.difference_update(slots)
        self.tier.grow(slots)

    @rule(slots=st.integers(0, 20))
    def shrink(self, slots):
        before = self.tier.slots
        self.tier.shrink(slots)
        assert self.tier.slots == min(before, slots)

    @rule()
    def collect(self):
        left = self.tier.take_left()
        assert not self.outside.intersection(left)
        assert not {slot for slot in left if slot in self.pins}
        assert not {slot for slot in left if slot in map(ticket_slot, self.tickets)}
        self.outside.update(left)

    @rule(count=st.integers(1, 5))
    def reserve(self, count):
        hashes = [(self.number + i).to_bytes(16, "big") for i in range(count)]
        self.number += count
        for ticket in self.tier.reserve(hashes):
            if ticket is not None:
                assert ticket_slot(ticket) not in self.outside
                self.tickets.append(ticket)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), pin=st.booleans())
    def publish(self, data, pin):
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        (done,) = self.tier.publish([ticket], pin)
        if done and pin:
            self.pins.append(ticket_slot(ticket))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def abort(self, data):
        self.tier.abort([self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))])

    @rule(data=st.data())
    def acquire(self, data):
        number = data.draw(st.integers(0, self.number))
        self.pins += self.tier.acquire([number.to_bytes(16, "big")])

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data):
        self.tier.unpin([self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))])

    @invariant()
    def every_slot_is_somewhere(self):
        stats = self.tier.stats()
        assert self.tier.slots + self.tier.leaving + len(self.outside) == 20
        assert stats["misuse"] == 0
        assert stats["filling"] == len(self.tickets)
        assert stats["pinned"] == len(set(self.pins))


TestSharedMemory = SharedMemoryMachine.TestCase


def test_a_closed_tier_still_tells_when_its_slots_are_left():
    memory = MappedMemory.anonymous(4 * 4096)
    tier = MemoryTier.within(memory, 4096)
    tier.grow([0, 1, 2, 3])
    first, second = tier.reserve([b"a" * 16, b"b" * 16])
    tier.publish([first], pin=True)
    tier.shrink(0)
    tier.close()
    assert sorted(tier.take_left()) == [2, 3]
    tier.unpin([ticket_slot(first)])
    tier.abort([second])
    assert sorted(tier.take_left()) == [0, 1]
    assert tier.leaving == 0
    with pytest.raises(ValueError, match="closed"):
        tier.view(0)


class TestStores:
    @pytest.fixture
    def now(self):
        return [0.0]

    @pytest.fixture
    def stores(self, now):
        stores = Stores(24 * 4096, lambda namespace, layout: [], clock=lambda: now[0])
        yield stores
        stores.close(5)
        stores.memory.close()

    def slots(self, opened):
        return opened.store.memory.slots

    def test_one_namespace_has_everything(self, stores):
        opened = stores.join(namespace_of(a=1), LAYOUT)
        assert self.slots(opened) == 24
        assert stores.join(namespace_of(a=1), LAYOUT) is opened
        assert opened.users == 2

    def test_namespaces_in_use_have_equal_shares(self, stores):
        first = stores.join(namespace_of(a=1), LAYOUT)
        second = stores.join(namespace_of(a=2), LAYOUT)
        assert [self.slots(first), self.slots(second)] == [12, 12]
        third = stores.join(namespace_of(a=3), LAYOUT)
        assert [self.slots(opened) for opened in (first, second, third)] == [8, 8, 8]

    def test_shares_are_bytes_not_slots(self, stores):
        narrow = stores.join(namespace_of(a=1), LAYOUT)
        wide = stores.join(namespace_of(WIDE, a=2), WIDE)
        assert wide.pages == 10
        assert [self.slots(narrow), self.slots(wide)] == [12, 1]

    def test_a_namespace_that_shrinks_keeps_what_is_leased_until_the_lease_ends(self, stores):
        first = stores.join(namespace_of(a=1), LAYOUT)
        hashes = chain(24)
        save(first.store, hashes)
        match = first.store.match(hashes)
        second = stores.join(namespace_of(a=2), LAYOUT)
        assert self.slots(second) == 0
        assert save(second.store, chain(1)) == 0
        assert read(first.store, match.slots) == [content(block) for block in hashes]
        assert first.store.match(hashes).slots == match.slots[:12]
        first.store.release(match.lease)
        stores.tend()
        assert self.slots(second) == 12
        assert save(second.store, chain(12)) == 12
        assert not set(match.slots[:12]) & set(second.store.match(chain(12)).slots)

    def test_reservations_are_waited_for_too(self, stores):
        first = stores.join(namespace_of(a=1), LAYOUT)
        tickets = first.store.reserve(ROOT, 0, chain(24))
        second = stores.join(namespace_of(a=2), LAYOUT)
        stores.tend()
        assert self.slots(second) == 0
        first.store.commit(tickets)
        stores.tend()
        assert self.slots(second) == 12
        assert len(first.store.match(chain(24)).slots) == 12

    def test_a_store_without_clients_keeps_its_blocks_while_it_is_alone(self, stores, now):
        opened = stores.join(namespace_of(a=1), LAYOUT)
        save(opened.store, chain(5))
        stores.leave(opened)
        now[0] += 100 * WARM_SECONDS
        stores.tend()
        again = stores.join(namespace_of(a=1), LAYOUT)
        assert again is opened
        assert len(again.store.match(chain(5)).slots) == 5

    def test_a_store_without_clients_makes_room_for_a_new_namespace(self, stores):
        unused = stores.join(namespace_of(a=1), LAYOUT)
        stores.leave(unused)
        opened = stores.join(namespace_of(a=2), LAYOUT)
        assert self.slots(opened) == 24
        eventually(unused.ended.is_set)
        again = stores.join(namespace_of(a=1), LAYOUT)
        assert again.epoch != unused.epoch
        assert self.slots(again) == 12

    def test_a_store_that_was_long_without_clients_makes_room_for_the_others(self, stores, now):
        kept = stores.join(namespace_of(a=1), LAYOUT)
        unused = stores.join(namespace_of(a=2), LAYOUT)
        stores.leave(unused)
        now[0] += WARM_SECONDS - 1
        stores.tend()
        assert self.slots(kept) == 12
        now[0] += 1
        stores.tend()
        assert self.slots(kept) == 24

    def test_who_comes_back_does_not_wait_for_one_that_is_being_opened(self, now):
        gate, opening = threading.Event(), threading.Event()

        def open_tiers(namespace, layout):
            if namespace == namespace_of(model="slow"):
                opening.set()
                gate.wait(60)
            return []

        stores = Stores(24 * 4096, open_tiers, clock=lambda: now[0])
        known = stores.join(namespace_of(), LAYOUT)
        thread = threading.Thread(target=lambda: stores.join(namespace_of(model="slow"), LAYOUT))
        thread.start()
        assert opening.wait(60)
        assert stores.join(namespace_of(), LAYOUT) is known
        assert thread.is_alive()
        gate.set()
        thread.join(60)
        assert len(stores.open_stores()) == 2
        stores.close(5)

    def test_memory_that_holds_no_block_for_each_is_said(self, stores):
        stores.join(namespace_of(WIDE, a=1), WIDE)
        stores.join(namespace_of(a=2), LAYOUT)
        with pytest.raises(ConfigError, match=r"memory\.size"):
            stores.join(namespace_of(a=3), LAYOUT)
        assert stores.stats()["stores"] == 2

    def test_a_tier_that_cannot_be_opened_leaves_nothing_behind(self, now):
        def fail(namespace, layout):
            raise ConfigError("no bucket")

        stores = Stores(24 * 4096, fail, clock=lambda: now[0])
        with pytest.raises(ConfigError, match="no bucket"):
            stores.join(namespace_of(a=1), LAYOUT)
        assert stores.stats() == {
            "stores": 0,
            "closing_stores": 0,
            "arena_bytes": 24 * 4096,
            "arena_free_bytes": 24 * 4096,
        }
        stores.memory.close()

    def test_a_fetch_that_outlives_its_store_keeps_its_slot(self, now):
        """A thread that still writes into a slot must not find another namespace's block there."""
        tier = DictTier("disk")
        stores = Stores(4 * 4096, lambda namespace, layout: [tier], flush_timeout=0.1, clock=lambda: now[0])
        opened = stores.join(namespace_of(), LAYOUT)
        save(opened.store, chain(2))
        assert opened.store.flush(10)
        opened.store.memory.discard(chain(2))
        tier.open.clear()
        opened.store.match(chain(2), wait=0)
        stores.leave(opened)
        other = stores.join(namespace_of(a=2), LAYOUT)
        eventually(opened.ended.is_set)
        stores.tend()
        assert self.slots(other) == 2
        tier.open.set()

        def all_back():
            stores.tend()
            return self.slots(other) == 4

        eventually(all_back)
        assert stores.stats()["closing_stores"] == 0
        stores.close(5)
        stores.memory.close()

    def test_many_namespaces_at_once_never_share_a_slot(self):
        stores = Stores(60 * 4096, lambda namespace, layout: [])
        failures = []

        def engine(number):
            rng = random.Random(number)
            try:
                for _ in range(5):
                    opened = stores.join(namespace_of(engine=number), LAYOUT)
                    for _ in range(20):
                        hashes = chain(rng.randrange(1, 8), seed=rng.randrange(5) + 10 * number)
                        save(opened.store, hashes)
                        match = opened.store.match(hashes)
                        got = read(opened.store, match.slots)
                        if got != [content(block) for block in hashes[: len(got)]]:
                            failures.append((number, "wrong bytes"))
                        opened.store.release(match.lease)
                        stores.tend()
                    stores.leave(opened)
            except Exception as error:
                failures.append((number, error))

        threads = [threading.Thread(target=engine, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        stores.close(5)
        stores.memory.close()
