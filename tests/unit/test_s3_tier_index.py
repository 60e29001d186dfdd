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


def only(gate: threading.Event, kind: str, part: str) -> Callable[[str, str], None]:
    """Hold requests of one kind for keys with `part` in them."""
    held = hold(gate, part)
    return lambda asked, key: held(asked, key) if asked == kind else None


def test_the_first_look_leaves_alone_what_this_node_is_just_storing(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    gate = threading.Event()
    bucket.before = only(gate, "list", "/packs/")
    tier = open_tier(ready=False)
    stored(tier, chain(3 * WINDOW))
    assert len(bucket.keys("packs/")) == 3
    segments = bucket.keys("index/")
    gate.set()
    eventually(lambda: tier.stats()["index_rebuilds"])
    assert tier.stats()["packs_recovered"] == 0
    assert bucket.keys("index/") == segments


def test_what_is_new_is_published_by_whoever_stored_it_though_others_may_have_found_it(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a pack's being there and its writer's hearing of it, anybody may look."""
    there, found = threading.Event(), threading.Event()
    put = bucket.put

    def slow_put(key: str, body: bytes) -> bool:
        written = put(key, body)
        if "/packs/" in key:
            there.set()
            assert found.wait(30)
        return written

    def before(kind: str, key: str) -> None:
        if (kind, "/packs/" in key) == ("list", True):
            assert there.wait(30)
        if (kind, "/index/" in key, found.is_set()) == ("put", True, False):
            found.set()
            raise TierUnavailable("whoever has found it cannot publish it now")

    monkeypatch.setattr(bucket, "put", slow_put)
    bucket.before = before
    tier, blocks = open_tier(ready=False), chain(WINDOW)
    stored(tier, blocks)
    assert found.is_set()
    assert len(bucket.keys("index/")) == 1
    assert open_tier().match(hashes_of(blocks)) == len(blocks)


def test_nothing_is_published_by_a_tier_that_has_been_closed(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    writer = open_tier()
    stored(writer, chain(WINDOW))
    writer.close()
    for key in bucket.keys("index/"):
        del bucket.objects[key]
    gate = threading.Event()
    bucket.before = only(gate, "get", "/packs/")
    tier = open_tier(ready=False)
    eventually(lambda: bucket.count("get", "/packs/"))
    tier.close()
    gate.set()
    eventually(lambda: not any(thread.name == "kvtier-s3-load" for thread in threading.enumerate()))
    assert bucket.keys("index/") == []


def test_only_a_few_segments_are_loaded_ahead_of_their_turn(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    writer = open_tier()
    stored(writer, chain(2))
    writer.close()
    [segment] = bucket.keys("index/")
    for number in range(100):
        bucket.objects[f"{ROOT}/index/{number:020d}-{'0' * 16}.kvi"] = bucket.objects[segment]
    gate = threading.Event()
    # The first one does not come, and what comes meanwhile must wait for it.
    bucket.before = only(gate, "get", f"{0:020d}-")
    before = bucket.count("get", "/index/")
    tier = open_tier(ready=False)
    eventually(lambda: bucket.count("get", "/index/") - before >= 16)
    time.sleep(0.2)
    assert bucket.count("get", "/index/") - before == 16
    gate.set()
    assert tier.wait_ready(30)
    assert bucket.count("get", "/index/") - before == 101
