"""Merging short packs: what becomes one, under which name, and what is left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3.bucket import RangeMissing
from kvtier.tiers.s3.gc import GRACE_SECONDS
from kvtier.tiers.s3.heat import load_heat
from kvtier.tiers.s3.pack import pack_name, read_footer, write_pack
from kvtier.tiers.s3.survey import SETTLED_SECONDS
from kvtier.tiers.s3.tombstone import write_tombstone
from tests.gc_support import HOUR, KEYS, Yard
from tests.s3_support import NAMESPACE, WINDOW, chain, hashes_of
from tests.s3_tier_support import fail_with


def test_short_packs_become_a_whole_one_and_go() -> None:
    yard = Yard()
    blocks = chain(2 * WINDOW + 4, size=900)
    packs = yard.store_chain(blocks, WINDOW, WINDOW + 3, WINDOW + 11, 2 * WINDOW)
    yard.now += SETTLED_SECONDS + 10
    assert yard.collect().merged == 1
    body, whole = write_pack(blocks[WINDOW : 2 * WINDOW], NAMESPACE.id)
    assert yard.bucket.objects[KEYS.pack(whole.name)] == body
    assert yard.listed() == {pack.name for pack in packs} | {whole.name}
    # Every node must have heard of it before the short ones go.
    yard.now += SETTLED_SECONDS - 5
    done = yard.collect()
    assert (done.merged, done.condemned) == (0, 0)
    yard.now += 15
    done = yard.collect()
    assert (done.merged, done.condemned) == (0, 3)
    yard.now += GRACE_SECONDS + 10
    assert yard.collect().deleted == 3
    assert yard.listed() == {packs[0].name, whole.name, packs[4].name}
    assert {pack.name for pack in packs if yard.there(pack)} == {packs[0].name, packs[4].name}


def test_what_is_not_worth_merging_is_left_alone() -> None:
    yard = Yard()
    common = chain(4, size=500)
    # Two chains that part after the fourth block: merged, it would be stored twice.
    yard.store(common)
    for seed in (5, 6):
        yard.store(chain(WINDOW, size=500, seed=seed, prefix=common)[4:])
    # A window that is not complete yet, and one whose end has only just come.
    yard.store_chain(chain(9, size=500, seed=7), 3)
    yard.now += SETTLED_SECONDS + 10
    yard.store_chain(chain(WINDOW, size=500, seed=8), 3)
    before = dict(yard.bucket.objects)
    assert yard.collect().merged == 0
    assert yard.bucket.objects == before


def test_a_corrupt_block_is_not_merged() -> None:
    yard = Yard()
    blocks = chain(WINDOW, size=500)
    yard.store_chain(blocks, 3)
    yard.now += SETTLED_SECONDS + 10

    def verify(payload: object, block_hash: bytes, namespace: bytes) -> None:
        if block_hash == blocks[7].hash:
            raise CorruptBlock("no")

    before = dict(yard.bucket.objects)
    assert yard.collect(verify=verify).merged == 0
    assert yard.bucket.objects == before


def test_packs_said_to_be_larger_than_any_are_not_even_read() -> None:
    yard = Yard()
    packs = yard.store_chain(chain(WINDOW, size=500), 3)
    offsets = packs[0].offsets[:]
    offsets[-1] = 1 << 40
    yard.now += 1
    yard.publish(replace(packs[0], offsets=offsets, size=(1 << 40) + 1000))
    yard.now += SETTLED_SECONDS + 10
    assert [len(run) for run in yard.plan().runs[NAMESPACE.hex]] == [2]
    assert yard.collect().merged == 0
    assert yard.bucket.count("get", "/packs/") == 0


@pytest.mark.parametrize("left", [0, 10, -5])
def test_what_a_killed_process_left_of_a_merged_pack_is_no_obstacle(left: int) -> None:
    yard = Yard()
    blocks = chain(WINDOW, size=500)
    packs = yard.store_chain(blocks, 3)
    body, whole = write_pack(blocks, NAMESPACE.id)
    yard.bucket.put(KEYS.pack(whole.name), body[:left])
    if not left:
        # A server says so of an object without bytes.
        yard.bucket.before = fail_with(RangeMissing("416"), "get", whole.name.hex())
    yard.now += SETTLED_SECONDS + 10
    assert yard.collect().merged == 1
    [merged] = yard.listed() - {pack.name for pack in packs}
    assert merged != whole.name
    footer = read_footer(*yard.bucket.get_tail(KEYS.pack(merged), 10_000), merged, NAMESPACE.id, 10_000)
    assert list(footer.hashes) == hashes_of(blocks)


def test_what_is_leaving_is_not_merged() -> None:
    yard = Yard()
    yard.store_chain(chain(WINDOW, size=500), 3, 9)
    yard.now += 3 * HOUR
    done = yard.collect(ttl=HOUR)
    assert (done.merged, done.condemned) == (0, 3)


def test_a_merged_pack_does_not_get_a_condemned_name() -> None:
    """The object under that name may go at any moment; the new one's name comes from the tombstone."""
    yard = Yard()
    blocks = chain(WINDOW, size=500)
    whole = yard.store(blocks)
    yard.now += 10
    now = int(yard.now * 1e9)
    tombstone = KEYS.new_tombstone(now)
    yard.bucket.put(tombstone, write_tombstone([whole.name], now, NAMESPACE.id))
    yard.now += 1
    yard.store_chain(blocks, 5)
    yard.now += SETTLED_SECONDS + 10
    assert yard.collect().merged == 1
    salted = pack_name(hashes_of(blocks), bytes.fromhex(tombstone[-20:-4]))
    assert salted in yard.listed()
    assert whole.name not in yard.listed()
    yard.now += GRACE_SECONDS + SETTLED_SECONDS
    yard.collect()
    yard.now += GRACE_SECONDS + 10
    yard.collect()
    assert yard.bucket.keys("packs/") == [KEYS.pack(salted)]


def test_uses_of_what_is_gone_are_not_folded() -> None:
    yard = Yard()
    blocks = chain(WINDOW, size=500)
    yard.store(blocks)
    for block in (blocks[3].hash, blocks[5].hash, b"?" * 16):
        yard.use(block)
    yard.collect()
    uses, summaries = load_heat(yard.bucket, KEYS, NAMESPACE.id)
    assert len(summaries) == 1
    assert set(uses) == {blocks[3].hash, blocks[5].hash}
