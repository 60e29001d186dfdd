"""The S3 tier over a bucket in memory, which behaves in ways that a real server seldom shows."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from kvtier.config import S3Config
from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier, uploader
from kvtier.tiers.s3.bucket import BadReply, BucketThrottled, BucketTimeout
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, read_footer
from tests.s3_support import (
    LAYOUT,
    MAX_BYTES,
    NAMESPACE,
    WINDOW,
    FakeBucket,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)

ROOT = f"kvtier/{NAMESPACE.hex}"


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


@pytest.fixture
def open_tier(bucket: FakeBucket) -> Iterator[Callable[..., S3Tier]]:
    tiers: list[S3Tier] = []

    def make(ready: bool = True, refresh: float = 0.1, **options: object) -> S3Tier:
        config = S3Config(bucket="in-memory", index_refresh=refresh, concurrency=4)
        settings = {"longest_pause": 0.2, **options}
        tier = S3Tier(config, NAMESPACE, LAYOUT, MAX_BYTES, bucket=bucket, **settings)  # type: ignore[arg-type]
        tiers.append(tier)
        if ready:
            # The first look for packs that no segment lists is over: it finds nothing by chance later on.
            eventually(lambda: tier.stats()["index_rebuilds"])
        return tier

    yield make
    bucket.before = lambda kind, key: None
    for tier in tiers:
        tier.close(5)


def fail_with(error: Exception, kinds: str = "get put list", part: str = "") -> Callable[[str, str], None]:
    def before(kind: str, key: str) -> None:
        if kind in kinds.split() and part in key:
            raise error

    return before


def hold(gate: threading.Event, part: str) -> Callable[[str, str], None]:
    def before(kind: str, key: str) -> None:
        if part in key:
            assert gate.wait(30)

    return before


def stored(tier: S3Tier, blocks: list[StoredBlock]) -> None:
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(30)


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


def test_a_slow_bucket_makes_the_queue_refuse(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
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


def test_discarded_blocks_stay_away_until_they_are_stored_anew(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(WINDOW)
    stored(tier, blocks)
    bad = [blocks[3].hash, blocks[5].hash]
    tier.discard(bad)
    assert tier.refresh()
    assert tier.match(hashes_of(blocks)) == 3
    assert tier.stats()["quarantined_blocks"] == 2
    assert [h for h, payload in read_all(tier, hashes_of(blocks)).items() if payload is None] == bad
    assert len(bucket.keys("packs/")) == 1
    stored(tier, [blocks[3], blocks[5]])
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)


def test_a_whole_discarded_pack_is_stored_under_another_name(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier, other = open_tier(), open_tier()
    blocks = chain(WINDOW)
    stored(tier, blocks)
    [key] = bucket.keys("packs/")
    body = bucket.objects[key]
    bucket.objects[key] = body[:16] + bytes(len(body) // 2) + body[16 + len(body) // 2 :]
    tier.discard(hashes_of(blocks))
    stored(tier, blocks)
    assert len(bucket.keys("packs/")) == 2
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    # Other nodes hear of it and take the newer of the two.
    assert other.refresh()
    assert read_all(other, hashes_of(blocks)) == payloads_of(blocks)


def test_a_pack_that_is_gone_is_forgotten_and_can_be_written_again(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(2 * WINDOW)
    stored(tier, blocks)
    gone = next(k for k in bucket.keys("packs/") if blocks[0].hash in footer_hashes(bucket, k))
    del bucket.objects[gone]
    got = read_all(tier, hashes_of(blocks))
    assert [got[h] for h in hashes_of(blocks[:WINDOW])] == [None] * WINDOW
    assert [got[h] for h in hashes_of(blocks[WINDOW:])] == [b.payload for b in blocks[WINDOW:]]
    assert tier.match(hashes_of(blocks)) == 0
    assert not tier.stats()["breaker_open"]
    stored(tier, blocks)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)


def footer_hashes(bucket: FakeBucket, key: str) -> tuple[bytes, ...]:
    body = bucket.objects[key]
    return read_footer(body[-MAX_TAIL_BYTES:], len(body), b"", NAMESPACE.id, MAX_BYTES).hashes


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


def test_breaker_answers_at_once_and_closes_by_itself(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(4)
    stored(tier, blocks)
    bucket.before = fail_with(BucketTimeout("hung"), "get list")
    eventually(lambda: tier.stats()["breaker_open"])
    assert tier.match(hashes_of(blocks)) == 0
    gets = bucket.count("get")
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert bucket.count("get") == gets
    bucket.before = lambda kind, key: None
    eventually(lambda: tier.match(hashes_of(blocks)) == 4)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)


def test_failing_reads_open_the_breaker_and_spare_the_rest(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    tier = open_tier()
    blocks = chain(20 * WINDOW, size=100)
    stored(tier, blocks)
    bucket.before = fail_with(BucketTimeout("hung"), "get list")
    gets = bucket.count("get", "/packs/")
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert bucket.count("get", "/packs/") - gets < 20
    assert tier.match(hashes_of(blocks)) == 0


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


def test_receivers_that_fail_do_not_keep_others_from_their_blocks(open_tier: Callable[..., S3Tier]) -> None:
    tier = open_tier()
    blocks = chain(2 * WINDOW)
    stored(tier, blocks)
    got: list[bytes] = []

    def deliver(block_hash: bytes, payload: object) -> None:
        got.append(block_hash)
        if len(got) % 3 == 0:
            raise RuntimeError("a defect of the receiver")

    unknown = [b"?" * 16]
    tier.read(hashes_of(blocks) + unknown, deliver)
    assert sorted(got) == sorted(hashes_of(blocks) + unknown)
    assert tier.stats()["errors_deliver"] == len(got) // 3


def test_payloads_are_read_only(open_tier: Callable[..., S3Tier]) -> None:
    tier = open_tier()
    [block] = chain(1)
    stored(tier, [block])
    writable: list[bool] = []
    tier.read([block.hash], lambda _, payload: writable.append(not memoryview(payload or b"").readonly))
    assert writable == [False]


def test_closing_ends_a_read_that_waits(bucket: FakeBucket, open_tier: Callable[..., S3Tier]) -> None:
    tier = open_tier()
    blocks = chain(10 * WINDOW, size=100)
    stored(tier, blocks)
    begun, go_on = threading.Event(), threading.Event()

    def before(kind: str, key: str) -> None:
        if kind == "get" and "/packs/" in key:
            begun.set()
            assert go_on.wait(30)

    bucket.before = before
    got: dict[bytes, bytes | None] = {}
    reading = threading.Thread(target=lambda: got.update(read_all(tier, hashes_of(blocks))))
    reading.start()
    assert begun.wait(30)
    tier.close(1)
    go_on.set()
    reading.join(30)
    assert got.keys() == set(hashes_of(blocks))
    assert None in got.values()
    assert tier.match(hashes_of(blocks)) == 0
    assert tier.write(chain(1, seed=9)) == 0
    tier.close()


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
