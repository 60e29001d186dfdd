"""Tombstones: the bytes, and what nodes make of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack import pack_name, write_pack
from kvtier.tiers.s3.tombstone import Tombstone, free_salt, read_tombstone, write_tombstone
from tests.s3_support import (
    NAMESPACE,
    WINDOW,
    FakeBucket,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)
from tests.s3_tier_support import bucket, open_tier

__all__ = ["bucket", "open_tier"]

KEYS = Keys("kvtier", NAMESPACE.hex)
names = st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=5)


@given(names, st.integers(0, 2**64 - 1))
def test_what_is_written_is_read(packs: list[bytes], since: int) -> None:
    data = write_tombstone(packs, since, NAMESPACE.id)
    assert read_tombstone(data, NAMESPACE.id) == Tombstone(tuple(packs), since)
    with pytest.raises(CorruptBlock):
        read_tombstone(data, b"?" * 16)


@given(names, st.data())
def test_damage_is_refused(packs: list[bytes], data: st.DataObject) -> None:
    good = write_tombstone(packs, 1, NAMESPACE.id)
    at = data.draw(st.integers(0, len(good) - 1))
    for bad in (good[:at], good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], good + b"x"):
        with pytest.raises(CorruptBlock):
            read_tombstone(bad, NAMESPACE.id)


@given(st.binary(max_size=100))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptBlock):
        read_tombstone(data, NAMESPACE.id)


def test_condemned_names_are_passed_by_and_circles_end() -> None:
    hashes = [b"a" * 16]
    first, second = b"1" * 8, b"2" * 8
    assert free_salt(hashes, {}) == b""
    condemned = {pack_name(hashes): first, pack_name(hashes, first): second}
    assert free_salt(hashes, condemned) == second
    assert free_salt(hashes, {pack_name(hashes): first, pack_name(hashes, first): first}) == first


def bury(bucket: FakeBucket, *packs: bytes) -> str:
    now = int(bucket.server_time() * 1e9)
    key = KEYS.new_tombstone(now)
    bucket.put(key, write_tombstone(packs, now, NAMESPACE.id))
    return key


def test_nodes_forget_what_a_tombstone_names_and_store_it_anew_under_one_name(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    """The condemned object may go at any moment: nobody may rely on finding it there, nor write it again."""
    blocks = chain(WINDOW, size=500)
    nodes = [open_tier(), open_tier()]
    nodes[0].write(blocks)
    assert nodes[0].flush(30)
    eventually(lambda: nodes[1].match(hashes_of(blocks)) == WINDOW)
    [old] = bucket.keys("packs/")
    key = bury(bucket, pack_name(hashes_of(blocks)))
    for node in nodes:
        eventually(lambda node=node: node.match(hashes_of(blocks)) == 0)
        assert node.write(blocks) == WINDOW
    for node in nodes:
        assert node.flush(30)
    salted = write_pack(blocks, NAMESPACE.id, bytes.fromhex(key[-20:-4]))[1]
    assert bucket.keys("packs/") == sorted([old, KEYS.pack(salted.name)])
    bucket.delete(old)
    for node in (*nodes, open_tier()):
        assert node.match(hashes_of(blocks)) == WINDOW
        assert read_all(node, hashes_of(blocks)) == payloads_of(blocks)


def test_a_node_that_starts_does_not_bring_condemned_packs_back(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    blocks = chain(WINDOW, size=500)
    writer = open_tier()
    writer.write(blocks)
    assert writer.flush(30)
    key = bury(bucket, pack_name(hashes_of(blocks)))
    # Neither where a segment still lists it nor where none does any more.
    for segments in (bucket.keys("index/"), [key]):
        for other in set(bucket.keys("index/")) - set(segments):
            bucket.delete(other)
        node = open_tier()
        assert node.match(hashes_of(blocks)) == 0
        assert node.rebuild_index() == 0
        assert node.match(hashes_of(blocks)) == 0


def test_a_corrupt_tombstone_costs_nothing(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
    blocks = chain(WINDOW, size=500)
    node = open_tier()
    node.write(blocks)
    assert node.flush(30)
    key = bury(bucket, pack_name(hashes_of(blocks)))
    eventually(lambda: node.match(hashes_of(blocks)) == 0)
    bucket.objects[key] = bucket.objects[key][:-1]
    late = open_tier()
    assert late.match(hashes_of(blocks)) == WINDOW
    assert read_all(late, hashes_of(blocks)) == payloads_of(blocks)
    assert late.stats()["index_segments_corrupt"] == 1
