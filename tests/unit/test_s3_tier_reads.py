"""What is read: discarded, gone, failing, and whoever fails to receive it; a bucket in memory."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.bucket import BucketTimeout
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, read_footer
from tests.s3_support import (
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
from tests.s3_tier_support import bucket, fail_with, open_tier, stored

__all__ = ["bucket", "open_tier"]


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


def test_blocks_are_misses_once_each_where_a_fetch_cannot_be_made(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier], monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, blocks = open_tier(), chain(2 * WINDOW)
    stored(tier, blocks)
    delivered: list[tuple[bytes, object]] = []

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    def break_down(*_: object) -> None:
        raise MemoryError

    for target, failure in (("lanes.os.eventfd", fail), ("reader._Buffer", break_down)):
        with monkeypatch.context() as patch:
            patch.setattr(f"kvtier.tiers.s3.{target}", failure)
            tier.read(hashes_of(blocks), lambda *block: delivered.append(block))
        assert sorted(delivered) == sorted((block, None) for block in hashes_of(blocks))
        delivered.clear()
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
