"""What is written: queued, refused, uploaded, given up, and what lies there already; a bucket in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest

from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier, uploader
from kvtier.tiers.s3.bucket import BadReply, BucketThrottled, BucketTimeout
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES
from tests.s3_support import (
    MAX_BYTES,
    WINDOW,
    FakeBucket,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)
from tests.s3_tier_support import bucket, fail_with, hold, open_tier, stored

__all__ = ["bucket", "open_tier"]


def test_known_and_queued_blocks_are_taken_but_not_written_again(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(WINDOW)
    stored(tier, blocks)
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(30)
    assert bucket.count("put", "/packs/") == 1
    assert tier.stats()["pending_bytes"] == 0


def test_a_caller_may_reuse_its_buffer(open_tier: Callable[..., S3Tier]) -> None:
    tier = open_tier()
    buffer = bytearray(b"a" * 1000)
    [block] = chain(1)
    tier.write([StoredBlock(block.hash, block.parent, 0, memoryview(buffer))])
    buffer[:] = b"b" * 1000
    assert tier.flush(30)
    assert read_all(tier, [block.hash]) == {block.hash: b"a" * 1000}


@pytest.mark.parametrize(
    "bad",
    [
        StoredBlock(b"short", b"p" * 16, 0, b"x"),
        StoredBlock(b"h" * 16, b"", 0, b"x"),
        StoredBlock(b"h" * 16, b"p" * 16, -1, b"x"),
        StoredBlock(b"h" * 16, b"p" * 16, 2**32, b"x"),
        StoredBlock(b"h" * 16, b"p" * 16, 0, b""),
        StoredBlock(b"h" * 16, b"p" * 16, 0, bytes(MAX_BYTES + 1)),
    ],
)
def test_impossible_blocks_are_refused(bad: StoredBlock, open_tier: Callable[..., S3Tier]) -> None:
    tier = open_tier()
    good = chain(2)
    assert tier.write([good[0], bad, good[1]]) == 2
    assert tier.stats()["blocks_refused"] == 1
    assert tier.flush(30)
    assert tier.match(hashes_of(good)) == 2


def test_a_slow_bucket_is_waited_for(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
    blocks = chain(8 * WINDOW, size=10_000)
    limit = 2 * WINDOW * 10_000
    tier = open_tier(pending_limit=limit)
    most = 0

    def slow(kind: str, key: str) -> None:
        nonlocal most
        most = max(most, tier.stats()["pending_bytes"])
        time.sleep(0.01)

    bucket.before = slow
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(30)
    assert tier.match(hashes_of(blocks)) == len(blocks)
    assert 0 < most <= limit


def test_a_bucket_that_stands_still_makes_the_queue_refuse(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "_PATIENCE_SECONDS", 0.05)
    blocks = chain(4 * WINDOW, size=10_000)
    limit = 2 * WINDOW * 10_000
    tier = open_tier(pending_limit=limit)
    gate = threading.Event()
    bucket.before = hold(gate, "/packs/")
    taken = tier.write(blocks)
    assert 2 * WINDOW <= taken < len(blocks)
    assert tier.stats()["pending_bytes"] <= limit
    assert tier.stats()["blocks_refused"] == len(blocks) - taken
    gate.set()
    assert tier.flush(30)
    assert tier.match(hashes_of(blocks)) == taken
    assert tier.write(blocks) == len(blocks)


def test_who_waits_for_room_is_refused_when_the_tier_is_closed(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    blocks = chain(12 * WINDOW, size=10_000)
    limit = 8 * WINDOW * 10_000
    tier = open_tier(pending_limit=limit)
    gate = threading.Event()
    bucket.before = hold(gate, "/packs/")
    taken: list[int] = []
    writer = threading.Thread(target=lambda: taken.append(tier.write(blocks)))
    writer.start()
    eventually(lambda: tier.stats()["pending_bytes"] > limit - 10_000)
    tier.close(0.05)
    writer.join(30)
    gate.set()
    # What waits in a tier that is closed is given up and counted.
    eventually(lambda: tier.stats()["pending_bytes"] == 0)
    assert taken[0] + tier.stats()["blocks_refused"] == len(blocks)


def test_a_bucket_that_is_down_for_long_costs_the_oldest_blocks(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    limit = 2 * WINDOW * 10_000
    tier = open_tier(pending_limit=limit)
    bucket.before = fail_with(TierUnavailable("down"), "put")
    chains = [chain(WINDOW, size=10_000, seed=seed) for seed in range(6)]
    tier.write(chains[0])
    eventually(lambda: tier.stats()["write_breaker_open"])
    for blocks in chains[1:]:
        eventually(partial(lambda wanted: tier.write(wanted) == WINDOW, blocks))
        assert tier.stats()["pending_bytes"] <= limit
    assert not tier.flush(0.05)
    bucket.before = lambda kind, key: None
    assert tier.flush(30)
    found = [tier.match(hashes_of(blocks)) for blocks in chains]
    assert found[-1] == WINDOW
    assert found[0] == 0
    assert tier.stats()["blocks_dropped"] == found.count(0) * WINDOW
    assert tier.stats()["pending_bytes"] == 0


def test_packs_are_published_while_more_are_waiting(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "_PUBLISH_SECONDS", 0.0)
    tier = open_tier()

    def before(kind: str, key: str) -> None:
        if kind == "put" and "/packs/" in key and bucket.count("put", "/packs/") > 5:
            eventually(lambda: bucket.keys("index/"), 20)

    bucket.before = before
    tier.write(chain(30 * WINDOW, size=100))
    assert tier.flush(60)
    assert not tier.stats().get("errors_unexpected")


@pytest.mark.parametrize(
    "error", [TierUnavailable("5xx"), BucketTimeout("t"), BucketThrottled("s"), AccessDenied("k")]
)
def test_uploads_are_tried_until_the_bucket_takes_them(
    error: Exception, bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(WINDOW + 3)
    bucket.before = fail_with(error, "put")
    assert tier.write(blocks) == len(blocks)
    assert not tier.flush(0.1)
    eventually(lambda: bucket.count("put", "/packs/") >= 4)
    assert tier.match(hashes_of(blocks)) == 0
    bucket.before = lambda kind, key: None
    assert tier.flush(30)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)


def test_a_pack_that_the_bucket_will_never_take_is_given_up(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "_RETRY_SECONDS", (0.001, 0.01))
    tier = open_tier()
    blocks = chain(2)
    bucket.before = fail_with(BadReply("400"), "put", "/packs/")
    tier.write(blocks)
    assert not tier.flush(30)
    assert tier.stats()["blocks_dropped"] == 2
    assert tier.stats()["pending_bytes"] == 0


def test_refused_writes_do_not_stop_reads(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
    tier = open_tier()
    blocks, more = chain(4), chain(4, seed=2)
    stored(tier, blocks)
    bucket.before = fail_with(AccessDenied("read-only"), "put")
    tier.write(more)
    eventually(lambda: tier.stats()["write_breaker_open"])
    assert tier.match(hashes_of(blocks)) == 4
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    # Not even where the lost index cannot be written again.
    for key in bucket.keys("index/"):
        del bucket.objects[key]
    fresh = open_tier(ready=False)
    eventually(lambda: fresh.match(hashes_of(blocks)) == 4)
    eventually(lambda: fresh.stats()["write_breaker_open"])
    assert read_all(fresh, hashes_of(blocks)) == payloads_of(blocks)


def test_a_pack_that_another_replica_wrote_is_read_as_that_one_laid_it_out(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    """KV of two replicas may differ in bits and so in encoded length; whose PUT came first holds."""
    first, second = open_tier(), open_tier()
    mine = chain(WINDOW)
    yours = [StoredBlock(b.hash, b.parent, b.position, b"y" * (50 + b.position)) for b in mine]
    gate = threading.Event()
    bucket.before = hold(gate, "/index/")
    first.write(mine)
    eventually(lambda: first.match(hashes_of(mine)) == WINDOW)
    assert second.match(hashes_of(mine)) == 0
    second.write(yours)
    eventually(lambda: second.match(hashes_of(mine)) == WINDOW)
    assert read_all(second, hashes_of(mine)) == payloads_of(mine)
    assert second.stats()["packs_found"] == 1
    gate.set()


def test_a_server_without_conditional_puts_only_costs_misses(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    bucket.conditional = False
    first, second = open_tier(), open_tier()
    mine = chain(WINDOW)
    yours = [StoredBlock(b.hash, b.parent, b.position, b"y" * (50 + b.position)) for b in mine]
    gate = threading.Event()
    bucket.before = hold(gate, "/index/")
    first.write(mine)
    eventually(lambda: first.match(hashes_of(mine)) == WINDOW)
    second.write(yours)
    eventually(lambda: second.match(hashes_of(mine)) == WINDOW)
    assert read_all(second, hashes_of(mine)) == payloads_of(yours)
    gate.set()
    assert second.flush(30)
    assert first.refresh()
    assert read_all(first, hashes_of(mine)) == payloads_of(yours)


@pytest.mark.parametrize("garbage", [b"", b"<html>", bytes(MAX_TAIL_BYTES * 2)])
def test_an_unusable_object_under_a_packs_name_is_written_around(
    garbage: bytes, bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    blocks = chain(WINDOW)
    stored(open_tier(), blocks)
    [key] = bucket.keys("packs/")
    for lost in bucket.keys("index/"):
        del bucket.objects[lost]
    bucket.objects[key] = garbage
    tier = open_tier()
    assert tier.match(hashes_of(blocks)) == 0
    stored(tier, blocks)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    assert bucket.objects[key] == garbage
    assert tier.stats()["packs_corrupt"] >= 1
    assert read_all(open_tier(), hashes_of(blocks)) == payloads_of(blocks)
