"""Prompts of which the arena, the disk and the bucket hold some blocks each, in any pattern."""

from __future__ import annotations

import random

import pytest

from kvtier.codec import BlockCodec
from kvtier.store import staging, ticket_slot
from tests.store_support import LAYOUT, NAMESPACE, ROOT, DictTier, chain, content, make_store, read

PATIENT = 20.0

CODEC = BlockCodec(LAYOUT, NAMESPACE.id)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A busy machine must not look like a tier that stands still."""
    monkeypatch.setattr(staging, "STALL_SECONDS", PATIENT)


class CountingTier(DictTier):
    """Counts the blocks that it is asked about."""

    asked = 0

    def match(self, hashes):
        self.asked += len(hashes)
        return super().match(hashes)


def hold(tier: DictTier, blocks) -> None:
    tier.blocks.update({block: bytes(CODEC.encode(block, content(block))) for block in blocks})


def make_resident(store, blocks) -> None:
    tickets = store.memory.reserve(blocks)
    for block, ticket in zip(blocks, tickets, strict=True):
        store.memory.view(ticket_slot(ticket))[:] = content(block)
    store.memory.publish(tickets)


@pytest.mark.parametrize("seed", range(20))
def test_the_leading_run_that_any_tier_holds_is_served(seed):
    print("seed", seed)
    rng = random.Random(seed)
    hashes = chain(rng.randrange(1, 60))
    disk, bucket = DictTier("disk"), DictTier("s3")
    store = make_store([disk, bucket], slots=64)
    chance = rng.random()
    places = [[place for place in range(3) if rng.random() < chance] for _ in hashes]
    for depth, tier in ((1, disk), (2, bucket)):
        hold(tier, [block for block, held in zip(hashes, places, strict=True) if depth in held])
    make_resident(store, [block for block, held in zip(hashes, places, strict=True) if 0 in held])
    expected = next((count for count, held in enumerate(places) if not held), len(hashes))
    match = store.match(hashes, PATIENT)
    assert read(store, match.slots) == [content(block) for block in hashes[:expected]]
    assert sum(match.sources.values()) == expected
    # Nothing that lies in the arena is fetched, and nothing behind the end of the run.
    resident = {block for block, held in zip(hashes, places, strict=True) if 0 in held}
    assert not resident & {*disk.reads, *bucket.reads}
    assert {*disk.reads, *bucket.reads} <= set(hashes[:expected])
    store.release(match.lease)
    stats = store.stats()
    assert (stats["leases"], stats["memory_filling"], stats["memory_pinned"]) == (0, 0, 0)
    store.close(5)


def test_what_a_lookup_asks_its_tiers_goes_with_its_length_whatever_the_pattern():
    hashes = chain(1000)
    disk, bucket = CountingTier("disk"), CountingTier("s3")
    store = make_store([disk, bucket], slots=1000)
    hold(disk, hashes[0::3])
    hold(bucket, hashes[1::3])
    make_resident(store, hashes[2::3])
    assert len(store.match(hashes, PATIENT).slots) == 1000
    assert disk.asked + bucket.asked < 50 * len(hashes)
    store.close(5)


def test_one_lookup_reads_a_tier_once():
    hashes = chain(40)
    disk = DictTier("disk")
    reads = []
    read_blocks = disk.read
    disk.read = lambda blocks, deliver: (reads.append(list(blocks)), read_blocks(blocks, deliver))
    store = make_store([disk], slots=64)
    hold(disk, hashes)
    make_resident(store, hashes[1::2])
    assert len(store.match(hashes, PATIENT).slots) == 40
    assert reads == [hashes[0::2]]
    store.close(5)


def test_the_arenas_own_blocks_make_no_room_for_the_others_of_a_prompt():
    hashes = chain(8)
    disk = DictTier("disk")
    store = make_store([disk], slots=6)
    hold(disk, hashes[0::2])
    make_resident(store, hashes[1::2])
    # Room for two more; what is resident of the rest stays.
    match = store.match(hashes, PATIENT)
    assert read(store, match.slots) == [content(block) for block in hashes[:4]]
    assert store.stats()["memory_evictions"] == 0
    store.close(5)


def test_a_block_that_somebody_fills_ends_the_run_and_keeps_its_slot():
    hashes = chain(6)
    disk = DictTier("disk")
    store = make_store([disk], slots=8)
    hold(disk, hashes)
    (ticket,) = store.reserve(ROOT, 3, hashes[3:4])
    match = store.match(hashes, PATIENT)
    assert read(store, match.slots) == [content(block) for block in hashes[:3]]
    assert store.stats()["memory_filling"] == 1
    store.slot_view(ticket_slot(ticket))[:] = content(hashes[3])
    store.commit([ticket])
    assert len(store.match(hashes, PATIENT).slots) == 6
    store.close(5)


@pytest.mark.parametrize("defect", ["match", "note_use"])
def test_a_tier_whose_defect_ends_a_lookup_leaves_no_pin(defect):
    class Defective(DictTier):
        def match(self, hashes):
            if defect == "match":
                raise ZeroDivisionError
            return 0

        def note_use(self, block):
            raise ZeroDivisionError

    store = make_store([Defective("disk")], slots=8)
    hashes = chain(4)
    make_resident(store, hashes[:2])
    with pytest.raises(ZeroDivisionError):
        store.match(hashes)
    assert store.stats()["memory_pinned"] == store.stats()["leases"] == 0
    store.close(5)
