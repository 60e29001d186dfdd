"""How the index of a node follows the bucket: at the start, at run time, and when it is lost."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable

import pytest

from kvtier.errors import TierUnavailable
from kvtier.tiers.s3 import S3Tier
from tests.s3_support import (
    NAMESPACE,
    WINDOW,
    FakeBucket,
    chain,
    eventually,
    hashes_of,
    read_all,
)
from tests.s3_tier_support import bucket, fail_with, hold, open_tier, stored

__all__ = ["bucket", "open_tier"]

ROOT = f"kvtier/{NAMESPACE.hex}"


def test_nothing_is_matched_before_the_index_is_loaded(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    blocks = chain(3)
    stored(open_tier(), blocks)
    gate = threading.Event()
    bucket.before = hold(gate, "/index/")
    late = open_tier(ready=False)
    assert late.match(hashes_of(blocks)) == 0
    assert set(read_all(late, hashes_of(blocks)).values()) == {None}
    gate.set()
    assert late.wait_ready(30)
    assert late.match(hashes_of(blocks)) == 3


def test_blocks_written_before_the_index_is_loaded_are_not_stored_twice(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    blocks = chain(2 * WINDOW)
    stored(open_tier(), blocks)
    puts = bucket.count("put", "/packs/")
    gate = threading.Event()
    bucket.before = hold(gate, "/index/")
    late = open_tier(ready=False)
    assert late.write(blocks) == len(blocks)
    gate.set()
    assert late.flush(30)
    assert bucket.count("put", "/packs/") == puts


@pytest.mark.parametrize("document", [b"", b"{", b"[]", b"\xff", json.dumps({"id": NAMESPACE.hex}).encode()])
def test_a_bucket_with_another_namespace_document_is_refused_until_that_is_gone(
    document: bytes, bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    key = f"{ROOT}/namespace.json"
    bucket.objects[key] = document
    tier = open_tier(ready=False)
    eventually(lambda: tier.stats()["namespace_mismatches"] >= 2)
    blocks = chain(WINDOW)
    tier.write(blocks)
    assert not tier.flush(0.1)
    assert bucket.keys("packs/") == []
    assert tier.match(hashes_of(blocks)) == 0
    assert bucket.objects[key] == document
    del bucket.objects[key]
    assert tier.flush(30)
    assert tier.match(hashes_of(blocks)) == WINDOW
    assert json.loads(bucket.objects[key]) == json.loads(NAMESPACE.document())


def test_a_segment_from_the_future_does_not_hide_those_of_the_present(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    reader, writer = open_tier(), open_tier()
    stored(writer, chain(2, seed=5))
    [segment] = bucket.keys("index/")
    ahead = f"{ROOT}/index/{time.time_ns() + 10**15:020d}-{'0' * 16}.kvi"
    bucket.objects[ahead] = bucket.objects[segment]
    assert reader.refresh()
    blocks = chain(2, seed=6)
    stored(writer, blocks)
    assert reader.refresh()
    assert reader.match(hashes_of(blocks)) == 2


def test_a_segment_of_a_slow_clock_is_found(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
    writer, reader = open_tier(), open_tier(refresh=3600)
    stored(writer, chain(2, seed=5))
    assert reader.refresh()
    blocks = chain(2, seed=6)
    stored(writer, blocks)
    newest = bucket.keys("index/")[-1]
    behind = f"{ROOT}/index/{time.time_ns() - 50 * 10**9:020d}-{'0' * 16}.kvi"
    bucket.objects[behind] = bucket.objects.pop(newest)
    assert reader.match(hashes_of(blocks)) == 0
    assert reader.refresh()
    assert reader.match(hashes_of(blocks)) == 2


def test_segments_are_loaded_once(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
    writer, reader = open_tier(), open_tier()
    stored(writer, chain(2))
    for _ in range(5):
        assert reader.refresh()
        assert writer.refresh()
    assert bucket.count("get", "/index/") == 1


def test_a_corrupt_segment_at_run_time_brings_its_packs_back_by_their_footers(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    reader, writer = open_tier(), open_tier()
    blocks = chain(3)
    spoil = itertools.count()

    def before(kind: str, key: str) -> None:
        # The first index segment is damaged on its way.
        if kind == "list" and "/index/" in key and bucket.keys("index/") and not next(spoil):
            [segment] = bucket.keys("index/")
            bucket.objects[segment] = bucket.objects[segment][:-1]

    bucket.before = before
    stored(writer, blocks)
    eventually(lambda: reader.match(hashes_of(blocks)) == 3)
    assert reader.stats()["index_segments_corrupt"] >= 1
    assert reader.stats()["packs_recovered"] >= 1
    # Healed for everybody: a fresh segment names the pack, so a third node needs no footer.
    eventually(lambda: len(bucket.keys("index/")) == 2)
    third = open_tier()
    assert third.match(hashes_of(blocks)) == 3


def test_an_index_that_was_lost_is_written_again(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(3 * WINDOW)
    stored(tier, blocks)
    packs = len(bucket.keys("packs/"))
    assert tier.rebuild_index() == 0
    for key in bucket.keys("index/"):
        del bucket.objects[key]
    footers = bucket.count("get", "/packs/")
    assert tier.rebuild_index() == packs
    assert bucket.count("get", "/packs/") == footers, "what this node knows needs no reading"
    fresh = open_tier()
    assert fresh.match(hashes_of(blocks)) == len(blocks)
    assert bucket.count("get", "/packs/") == footers


def test_rebuilding_says_when_the_bucket_is_down(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    bucket.before = fail_with(TierUnavailable("down"))
    with pytest.raises(TierUnavailable):
        tier.rebuild_index()
    assert not tier.refresh()
