"""The faults that were provoked in other KV caches, each on real tiers: kvtier must not have them.

Every test is named after what went wrong elsewhere. The blocks are random bytes of a known hash; the disk is
a real directory, the bucket a real S3 server.
"""

from __future__ import annotations

import pytest

from kvtier.codec import BlockCodec
from kvtier.config import Config, DiskConfig, MemoryConfig
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore
from tests.s3_support import BUCKET, eventually
from tests.store_support import chain, content, make_store, read, save

LAYOUT = BlockLayout("bfloat16", tokens_per_block=4, layers=4, kv_factor=2, row_elements=512)
PATIENT = 30.0
BLOCKS = 12


def expected(hashes):
    return [content(block, LAYOUT.block_bytes) for block in hashes]


@pytest.fixture
def open_store(tmp_path, s3_bucket):
    """Open stores as nodes do: from a configuration. Closes them all."""
    stores = []

    def open_one(node: str | None = None, bucket: bool = True, memory: int = 8 << 20, **s3) -> TieredStore:
        config = Config(
            memory=MemoryConfig(size=memory),
            disk=DiskConfig(path=tmp_path / node, size=64 << 20) if node else None,
            s3=s3_bucket.config(**s3) if bucket else None,
        )
        store = TieredStore.open(config, make_store(layout=LAYOUT).namespace, LAYOUT)
        stores.append(store)
        if bucket:
            eventually(lambda: store.stats()["s3_ready"])
        return store

    yield open_one
    for store in stores:
        store.close(20)


def objects(place, kind: str) -> list[str]:
    """Return the keys of all packs, or of all index segments, of this test."""
    pages = place.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=place.prefix)
    keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
    return [key for key in keys if f"/{kind}/" in key]


def files_of_blocks(directory):
    """Return the files on disk that hold blocks."""
    files = sorted(directory.rglob("*.val"))
    assert len(files) == BLOCKS
    return files


def write_to_bucket(open_store, hashes) -> None:
    """Store blocks from a node that then goes away."""
    store = open_store()
    assert save(store, hashes) == len(hashes)
    store.close(20)


@pytest.mark.parametrize("cut", [0, 1, 100, 4096])
def test_truncated_file_is_served_with_stale_memory_in_its_tail(open_store, tmp_path, cut):
    store = open_store("a", bucket=False)
    hashes = chain(BLOCKS)
    save(store, hashes)
    assert store.flush(PATIENT)
    store.close(20)
    for file in files_of_blocks(tmp_path / "a"):
        with file.open("r+b") as data:
            data.truncate(cut)
    again = open_store("a", bucket=False)
    # The arena's memory is anything but zero: what is not overwritten would be seen.
    save(again, chain(BLOCKS, seed=5))
    assert again.match(hashes, wait=PATIENT).slots == ()


def test_truncated_body_is_served_with_stale_memory_in_its_tail(open_store, s3_bucket):
    hashes = chain(BLOCKS)
    write_to_bucket(open_store, hashes)
    (pack,) = objects(s3_bucket, "packs")
    node = open_store()
    s3_bucket.put(pack, s3_bucket.get(pack)[:1000])
    assert node.match(hashes, wait=PATIENT).slots == ()


def test_flipped_bytes_pass(open_store, s3_bucket, tmp_path):
    hashes = chain(BLOCKS)
    store = open_store("a")
    save(store, hashes)
    store.close(20)
    for file in files_of_blocks(tmp_path / "a"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0x10
        file.write_bytes(data)
    (pack,) = objects(s3_bucket, "packs")
    body = bytearray(s3_bucket.get(pack))
    # One bit in the middle of the last block; the disk's copies are all bad, the bucket's others good.
    size = len(BlockCodec(LAYOUT, store.namespace.id).encode(hashes[0], expected(hashes)[0]))
    body[(BLOCKS - 1) * size + size // 2] ^= 0x10
    s3_bucket.put(pack, bytes(body))
    node = open_store("a")
    match = node.match(hashes, wait=PATIENT)
    assert read(node, match.slots) == expected(hashes[:-1])
    assert node.stats()["disk_corrupt_blocks"] == BLOCKS
    assert node.stats()["s3_corrupt_blocks"] == 1


def test_a_failed_get_in_a_batch_shifts_the_following_blocks_by_one(open_store, s3_bucket):
    hashes = chain(600)
    write_to_bucket(open_store, hashes[:200])
    store = open_store()
    save(store, hashes[200:], hashes[199], 200)
    store.close(20)
    packs = objects(s3_bucket, "packs")
    assert len(packs) > 2
    node = open_store(memory=32 << 20)
    for pack in packs[::2]:
        s3_bucket.delete([pack])
    read_back = 0
    for start in range(0, 600, 7):
        match = node.match(hashes[start : start + 7], wait=PATIENT)
        assert read(node, match.slots) == expected(hashes[start : start + len(match.slots)])
        read_back += len(match.slots)
        node.release(match.lease)
    assert 0 < read_back < 600


def test_an_object_of_twice_the_size_overruns_its_neighbour(open_store, s3_bucket, tmp_path):
    hashes = chain(BLOCKS)
    store = open_store("a")
    save(store, hashes)
    store.close(20)
    for file in files_of_blocks(tmp_path / "a")[::2]:
        file.write_bytes(file.read_bytes() * 2)
    (pack,) = objects(s3_bucket, "packs")
    s3_bucket.put(pack, s3_bucket.get(pack) * 2)
    for node in (open_store("a"), open_store()):
        neighbours = chain(BLOCKS, seed=3)
        save(node, neighbours)
        match = node.match(hashes, wait=PATIENT)
        assert read(node, match.slots) == expected(hashes[: len(match.slots)])
        assert read(node, node.match(neighbours).slots) == expected(neighbours)


def test_a_full_staging_pool_returns_an_unread_block_and_deadlocks_the_next_call(open_store):
    hashes = chain(BLOCKS)
    write_to_bucket(open_store, hashes)
    node = open_store(memory=1 << 20)
    others = chain(node.memory.slots, seed=1)
    assert save(node, others) == len(others)
    held = node.match(others)
    assert node.match(hashes, wait=PATIENT).slots == ()
    assert read(node, held.slots) == expected(others)
    node.release(held.lease)
    match = node.match(hashes, wait=PATIENT)
    assert read(node, match.slots) == expected(hashes)


def test_with_a_hung_bucket_a_purely_local_hit_takes_twenty_seconds(open_store, s3_bucket):
    """The server stays hung until the lookup has answered: an answer at all is the proof."""
    hashes = chain(BLOCKS)
    store = open_store("a")
    save(store, hashes)
    store.close(20)
    node = open_store("a")
    asked = node.stats()["s3_get_requests"]
    with s3_bucket.server.paused():
        match = node.match(hashes, wait=PATIENT)
        assert dict(match.sources) == {"disk": BLOCKS}
        assert node.stats()["s3_get_requests"] == asked
        assert read(node, match.slots) == expected(hashes)
        resident = node.match(hashes, wait=PATIENT)
        assert dict(resident.sources) == {"memory": BLOCKS}


def test_after_a_restart_the_disk_has_no_hits_and_orphans_its_files(open_store, tmp_path):
    hashes = chain(BLOCKS)
    for _ in range(3):
        store = open_store("a", bucket=False)
        save(store, hashes)
        assert store.flush(PATIENT)
        store.close(20)
    assert len(files_of_blocks(tmp_path / "a")) == BLOCKS
    again = open_store("a", bucket=False)
    match = again.match(hashes, wait=PATIENT)
    assert dict(match.sources) == {"disk": BLOCKS}
    assert read(again, match.slots) == expected(hashes)


def test_a_bucket_outage_disables_the_tier_until_restart(open_store, s3_bucket):
    hashes, late = chain(BLOCKS), chain(BLOCKS, seed=2)
    write_to_bucket(open_store, hashes)
    node = open_store(connect_timeout=0.5, read_timeout=0.5)
    s3_bucket.server.kill()
    try:
        assert node.match(hashes, wait=PATIENT).slots == ()
        save(node, late)
    finally:
        s3_bucket.server.restart()

    def served() -> bool:
        match = node.match(hashes, wait=1)
        node.release(match.lease)
        return len(match.slots) == BLOCKS

    eventually(served)
    assert node.flush(PATIENT)
    fresh = open_store()
    assert read(fresh, fresh.match(late, wait=PATIENT).slots) == expected(late)


def test_negative_answers_are_cached_for_ever(open_store):
    hashes = chain(BLOCKS)
    reader = open_store()
    for _ in range(5):
        assert reader.match(hashes, wait=0).slots == ()
    write_to_bucket(open_store, hashes)

    def found() -> bool:
        match = reader.match(hashes, wait=1)
        reader.release(match.lease)
        return len(match.slots) == BLOCKS

    eventually(found)


def test_the_first_sight_of_a_cold_prefix_is_always_a_miss(open_store):
    hashes = chain(BLOCKS)
    write_to_bucket(open_store, hashes)
    match = open_store().match(hashes, wait=PATIENT)
    assert dict(match.sources) == {"s3": BLOCKS}


def test_a_lookup_of_many_blocks_costs_a_request_each(open_store):
    hashes = chain(200)
    write_to_bucket(open_store, hashes)
    node = open_store(memory=16 << 20)
    before = node.stats()
    match = node.match(hashes, wait=PATIENT)
    assert len(match.slots) == 200
    after = node.stats()
    assert after["s3_get_requests"] - before["s3_get_requests"] <= 2
    assert node.match(chain(200, seed=8), wait=PATIENT).slots == ()
    quiet = node.stats()
    assert quiet["s3_get_requests"] == after["s3_get_requests"]


def test_an_all_miss_lookup_costs_as_much_as_a_hit(open_store, s3_bucket):
    """The server hangs meanwhile: an answer at all is the proof that nobody was asked."""
    node = open_store()
    asked = node.stats()["s3_get_requests"]
    with s3_bucket.server.paused():
        assert node.match(chain(500, seed=4), wait=PATIENT).slots == ()
    assert node.stats()["s3_get_requests"] == asked
