"""Staging and write-through: what the store does with tiers that are slow, lossy, lying or full."""

from __future__ import annotations

import threading
import time

import pytest

from kvtier.codec import BlockCodec
from kvtier.store import staging, ticket_slot, writing
from tests.store_support import LAYOUT, NAMESPACE, ROOT, DictTier, chain, content, make_store, read, save

PATIENT = 20.0
"""Seconds to wait for what is expected to come: only a failing test takes so long."""


@pytest.fixture(autouse=True)
def unhurried(monkeypatch):
    """On a busy machine a tier is not stalled that has delivered nothing for a quarter of a second."""
    monkeypatch.setattr(staging, "STALL_SECONDS", PATIENT)


def filled(name: str, hashes) -> DictTier:
    """Return a tier that holds these blocks, encoded."""
    tier, codec = DictTier(name), BlockCodec(LAYOUT, NAMESPACE.id)
    tier.blocks = {block: bytes(codec.encode(block, content(block))) for block in hashes}
    return tier


def settled(store, hashes, blocks: int) -> None:
    """Wait until `blocks` of `hashes` lie in the arena."""
    until = time.monotonic() + PATIENT
    while store.memory.match(hashes) < blocks:
        assert time.monotonic() < until, "the blocks did not arrive"
        time.sleep(0.005)


def test_a_lookup_does_not_wait_longer_than_told_and_the_next_one_is_served():
    hashes = chain(4)
    tier = filled("s3", hashes)
    tier.open.clear()
    store = make_store([tier])
    assert store.match(hashes, wait=0).slots == ()
    tier.open.set()
    settled(store, hashes, 4)
    match = store.match(hashes, wait=0)
    assert read(store, match.slots) == [content(block) for block in hashes]
    assert tier.reads == hashes
    store.close(5)


def test_a_local_run_is_answered_although_the_bucket_hangs(monkeypatch):
    monkeypatch.setattr(staging, "STALL_SECONDS", 0.1)
    hashes = chain(6)
    disk, s3 = filled("disk", hashes[:3]), filled("s3", hashes)
    s3.open.clear()
    store = make_store([disk, s3])
    match = store.match(hashes, wait=PATIENT)
    assert dict(match.sources) == {"disk": 3}
    assert read(store, match.slots) == [content(block) for block in hashes[:3]]
    s3.open.set()
    store.close(5)


def test_a_tier_that_stands_still_is_not_waited_for_although_the_lookup_might(monkeypatch):
    monkeypatch.setattr(staging, "STALL_SECONDS", 1.0)
    hashes, hang, over = chain(3), threading.Event(), []
    tier = filled("s3", hashes)

    def read(blocks, deliver):
        deliver(blocks[0], tier.blocks[blocks[0]])
        over.append(hang.wait(3 * PATIENT))

    tier.read = read
    store = make_store([tier])
    assert len(store.match(hashes, wait=3600.0).slots) == 1
    assert over == []
    hang.set()
    store.close(5)


def test_a_purely_local_hit_never_asks_the_bucket():
    hashes = chain(3)
    disk, s3 = filled("disk", hashes), filled("s3", hashes)
    s3.open.clear()
    store = make_store([disk, s3])
    assert len(store.match(hashes, wait=PATIENT).slots) == 3
    assert s3.reads == []
    store.close(5)


def test_concurrent_lookups_share_one_fetch():
    hashes = chain(8)
    tier = filled("s3", hashes)
    tier.open.clear()
    store = make_store([tier])
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(store.match(hashes, wait=PATIENT))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    while not tier.reads:
        time.sleep(0.005)
    tier.open.set()
    for thread in threads:
        thread.join()
    assert tier.reads == hashes
    assert [len(answer.slots) for answer in answers] == [8] * 6
    assert len({answer.slots for answer in answers}) == 1
    store.close(5)


def test_a_corrupt_block_ends_the_run_and_is_quarantined():
    hashes = chain(4)
    tier = filled("s3", hashes)
    damaged = bytearray(tier.blocks[hashes[2]])
    damaged[-1] ^= 1
    tier.blocks[hashes[2]] = bytes(damaged)
    store = make_store([tier])
    match = store.match(hashes, wait=PATIENT)
    assert read(store, match.slots) == [content(block) for block in hashes[:2]]
    store.release(match.lease)
    assert tier.discarded == [hashes[2]]
    assert store.stats()["s3_corrupt_blocks"] == 1
    assert store.stats()["filling_slots"] == 0
    assert store.memory.stats()["filling"] == 0
    store.close(5)


def test_blocks_of_another_name_are_not_served():
    hashes, other = chain(2), chain(2, seed=9)
    tier = filled("s3", hashes)
    tier.blocks = dict(zip(other, tier.blocks.values(), strict=True))
    store = make_store([tier])
    assert store.match(other, wait=PATIENT).slots == ()
    store.close(5)


def test_a_failed_read_in_the_middle_does_not_shift_what_follows():
    hashes = chain(5)
    tier = filled("s3", hashes)
    tier.lost = {hashes[1]}
    store = make_store([tier])
    match = store.match(hashes, wait=PATIENT)
    assert read(store, match.slots) == [content(hashes[0])]
    later = store.match(hashes[2:], wait=PATIENT)
    assert read(store, later.slots) == [content(block) for block in hashes[2:]]
    store.close(5)


def test_what_the_disk_lost_comes_from_the_bucket_and_is_promoted():
    hashes = chain(4)
    disk, s3 = filled("disk", hashes[:3]), filled("s3", hashes)
    disk.lost = set(hashes[1:3])
    store = make_store([disk, s3])
    match = store.match(hashes, wait=PATIENT)
    assert read(store, match.slots) == [content(block) for block in hashes]
    assert store.flush(PATIENT)
    assert set(disk.blocks) == set(hashes)
    store.close(5)


def test_a_tier_that_raises_is_a_miss_and_frees_its_slots():
    hashes = chain(3)
    tier = filled("s3", hashes)
    tier.read = lambda hashes, deliver: 1 / 0
    store = make_store([tier])
    assert store.match(hashes, wait=PATIENT).slots == ()
    assert store.memory.stats()["filling"] == 0
    store.close(5)


def test_a_tier_that_delivers_twice_does_not_touch_a_promised_slot():
    hashes = chain(1)
    tier = filled("s3", hashes)
    wrong = bytes(len(tier.blocks[hashes[0]]))
    accepted, promised = threading.Event(), threading.Event()

    def read_twice(blocks, deliver):
        deliver(blocks[0], tier.blocks[blocks[0]])
        promised.wait(PATIENT)
        deliver(blocks[0], wrong)
        accepted.set()

    tier.read = read_twice
    store = make_store([tier])
    match = store.match(hashes, wait=PATIENT)
    promised.set()
    assert accepted.wait(PATIENT)
    assert read(store, match.slots) == [content(hashes[0])]
    assert "s3_corrupt_blocks" not in store.stats()
    store.close(5)


def test_a_prefix_longer_than_the_arena_is_served_as_far_as_it_fits():
    hashes = chain(12)
    store = make_store([filled("s3", hashes)], slots=5)
    match = store.match(hashes, wait=PATIENT)
    assert read(store, match.slots) == [content(block) for block in hashes[:5]]
    store.release(match.lease)
    assert store.memory.stats()["filling"] == 0
    store.close(5)


def test_a_save_under_way_is_not_fetched_and_leaks_nothing():
    hashes = chain(4)
    store = make_store([filled("s3", hashes)])
    (ticket,) = store.reserve(hashes[0], 1, hashes[1:2])
    match = store.match(hashes, wait=PATIENT)
    assert read(store, match.slots) == [content(hashes[0])]
    assert store.memory.stats()["filling"] == 1
    store.slot_view(ticket_slot(ticket))[:] = content(hashes[1])
    store.commit([ticket])
    assert len(store.match(hashes, wait=PATIENT).slots) == 4
    store.close(5)


def test_a_tier_that_hangs_on_write_loses_blocks_but_holds_nobody_up():
    hang = threading.Event()
    slow, fast = DictTier("disk"), DictTier("s3")
    slow.write = lambda blocks: hang.wait(PATIENT) and 0
    store = make_store([slow, fast])
    for seed in range(20):
        save(store, chain(2, seed))
    until = time.monotonic() + PATIENT
    while len(fast.blocks) < 40 and store.stats()["encoding_blocks"]:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert len(fast.blocks) + store.stats().get("encode_dropped_blocks", 0) == 40
    assert not store.flush(0.05)
    hang.set()
    store.close(5)


def test_what_waits_for_a_slow_tier_is_bounded_in_bytes(monkeypatch):
    hang, begun = threading.Event(), threading.Event()
    tier = DictTier("disk")
    honest = tier.write

    def write(blocks):
        begun.set()
        hang.wait(PATIENT)
        return honest(blocks)

    tier.write = write
    store = make_store([tier])
    save(store, chain(1, 100))
    assert begun.wait(PATIENT)
    until = time.monotonic() + PATIENT
    size = store.stats()["queued_bytes"]
    assert size > 0
    monkeypatch.setattr(writing, "MAX_QUEUED_BYTES", 3 * size)
    for seed in range(6):
        save(store, chain(1, seed))
    while store.stats()["encoding_blocks"]:
        assert time.monotonic() < until
        time.sleep(0.005)
    values = store.stats()
    assert 0 < values["queued_bytes"] <= 3 * size
    assert values["disk_dropped_blocks"] >= 3
    hang.set()
    assert store.flush(PATIENT)
    assert len(tier.blocks) == 7 - values["disk_dropped_blocks"]
    store.close(5)


def test_a_tier_whose_write_raises_goes_on_being_written_to():
    tier = DictTier("disk")
    honest = tier.write
    tier.write = lambda blocks: 1 / 0
    store = make_store([tier])
    save(store, chain(1))
    assert store.flush(PATIENT)
    tier.write = honest
    save(store, chain(1, seed=1))
    assert store.flush(PATIENT)
    assert set(tier.blocks) == set(chain(1, seed=1))
    assert store.stats()["disk_write_defects"] == 1
    store.close(5)


def test_what_a_lower_tier_holds_already_is_not_encoded_again():
    hashes = chain(3)
    tier = filled("s3", hashes)
    store = make_store([tier])
    save(store, hashes)
    assert store.flush(PATIENT)
    assert "encoded_bytes" not in store.stats()
    store.close(5)


def test_close_flushes_what_was_committed():
    tier = DictTier("s3")
    store = make_store([tier], slots=64)
    for seed in range(10):
        save(store, chain(3, seed))
    store.close(PATIENT)
    assert len(tier.blocks) + store.stats().get("encode_dropped_blocks", 0) == 30
    assert tier.closed


def test_statistics_are_numbers_under_their_tiers_names():
    store = make_store([filled("s3", chain(2))])
    store.match(chain(2), wait=PATIENT)
    stats = store.stats()
    assert stats["hit_blocks_s3"] == 2
    assert stats["s3_blocks"] == 2
    assert stats["memory_blocks"] == 2
    assert all(isinstance(value, (int, float)) for value in stats.values())
    store.close(5)


def test_an_arena_smaller_than_a_block_is_refused():
    from kvtier.errors import ConfigError

    with pytest.raises(ConfigError, match="does not hold one block"):
        make_store(slots=0)


def test_the_chain_is_kept_with_every_block():
    seen = {}
    tier = DictTier("s3")
    tier.write = lambda blocks: seen.update({b.hash: (b.parent, b.position) for b in blocks})
    store = make_store([tier])
    hashes = chain(4)
    save(store, hashes[:2])
    save(store, hashes[2:], hashes[1], 2)
    store.close(5)
    parents = [ROOT, *hashes]
    assert seen == {block: (parents[i], i) for i, block in enumerate(hashes)}


class SlowTier(DictTier):
    """A tier whose reads take some time to begin with their first block."""

    seconds = 0.1

    def read(self, hashes, deliver) -> None:
        time.sleep(self.seconds)
        super().read(hashes, deliver)


def slow_store(hashes):
    tier = SlowTier("s3")
    tier.blocks = filled("s3", hashes).blocks
    return tier, make_store([tier])


def test_what_is_computed_sooner_than_it_arrives_is_not_fetched():
    hashes = chain(12)
    tier, store = slow_store(hashes)
    for block in hashes[:3]:
        assert len(store.match([block], wait=PATIENT).slots) == 1
    assert store.match(hashes[3:5], wait=PATIENT, block_cost=0.01).slots == ()
    assert tier.reads == hashes[:3]
    assert len(store.match(hashes[3:5], wait=PATIENT).slots) == 2
    store.close(5)


def test_what_arrives_sooner_than_it_is_computed_is_waited_for():
    hashes = chain(12)
    _, store = slow_store(hashes)
    for block in hashes[:3]:
        assert len(store.match([block], wait=PATIENT).slots) == 1
    assert len(store.match(hashes[3:], wait=PATIENT, block_cost=PATIENT).slots) == 9
    store.close(5)


def test_a_tier_that_was_slow_once_is_waited_for_again():
    hashes = chain(12)
    tier, store = slow_store(hashes)
    for seconds, block in zip((0.0, 0.0, 0.2, 0.0), hashes, strict=False):
        tier.seconds = seconds
        assert len(store.match([block], wait=PATIENT).slots) == 1
    assert len(store.match(hashes[4:], wait=PATIENT, block_cost=0.01 * PATIENT).slots) == 8
    store.close(5)


def test_a_tier_that_wants_to_hears_of_hits_in_all_tiers_by_their_last_block():
    class Curious(DictTier):
        def __init__(self) -> None:
            super().__init__("s3")
            self.used: list[bytes] = []

        def note_use(self, block_hash: bytes) -> None:
            self.used.append(block_hash)

    hashes = chain(4)
    curious = Curious()
    store = make_store([filled("disk", hashes[:3]), curious])
    assert len(store.match(hashes, wait=PATIENT).slots) == 3
    assert len(store.match(hashes[:2], wait=0).slots) == 2
    assert store.match(chain(2, seed=9), wait=0).slots == ()
    assert curious.used == [hashes[2], hashes[1]]
    store.close(5)
