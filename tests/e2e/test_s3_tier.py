"""The S3 tier on a real S3 server: what one node writes, another reads, with few requests."""

from __future__ import annotations

import json
import math
import threading

import pytest

from kvtier.hashing import Namespace
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.reader import RANGE_BYTES
from tests.s3_support import (
    BUCKET,
    LAYOUT,
    MAX_BYTES,
    NAMESPACE,
    WINDOW,
    S3Place,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)


@pytest.mark.parametrize("count", [1, WINDOW, 2 * WINDOW + 5])
def test_another_node_reads_exactly_what_one_wrote(s3_bucket: S3Place, count: int) -> None:
    blocks = chain(count)
    first = s3_bucket.tier()
    assert first.write(blocks) == count
    assert first.flush(60)
    assert first.match(hashes_of(blocks)) == count
    first.close()

    second = s3_bucket.tier()
    assert second.match(hashes_of(blocks)) == count
    assert read_all(second, hashes_of(blocks)) == payloads_of(blocks)
    some = hashes_of(blocks[::2])
    assert read_all(second, some) == {h: payloads_of(blocks)[h] for h in some}
    second.close()


def test_a_running_node_hears_of_new_packs_by_itself(s3_bucket: S3Place) -> None:
    writer, reader = s3_bucket.tier(), s3_bucket.tier()
    blocks = chain(WINDOW)
    assert reader.match(hashes_of(blocks)) == 0
    writer.write(blocks)
    eventually(lambda: reader.match(hashes_of(blocks)) == WINDOW)
    assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    writer.close()
    reader.close()


def test_incomplete_packs_are_uploaded_without_a_flush(s3_bucket: S3Place) -> None:
    writer, reader = s3_bucket.tier(), s3_bucket.tier()
    blocks = chain(3)
    writer.write(blocks)
    eventually(lambda: reader.match(hashes_of(blocks)) == 3)
    writer.close()
    reader.close()


def test_nodes_that_race_to_write_a_chain_store_it_once(s3_bucket: S3Place) -> None:
    blocks = chain(4 * WINDOW, size=5_000)
    nodes = [s3_bucket.tier() for _ in range(2)]
    start = threading.Barrier(len(nodes))

    def write(node: S3Tier) -> None:
        start.wait(30)
        node.write(blocks)
        assert node.flush(60)

    threads = [threading.Thread(target=write, args=(node,)) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(s3_bucket.keys("packs")) == 4
    assert sum(node.stats()["packs_uploaded"] for node in nodes) == 4
    for node in nodes:
        assert read_all(node, hashes_of(blocks)) == payloads_of(blocks)
        node.close()


def test_chains_that_share_a_prefix_share_its_packs(s3_bucket: S3Place) -> None:
    common = chain(2 * WINDOW, size=2_000)
    left, right = (chain(3 * WINDOW, size=2_000, seed=seed, prefix=common) for seed in (7, 8))
    tier = s3_bucket.tier()
    tier.write(left)
    tier.write(right)
    assert tier.flush(60)
    assert len(s3_bucket.keys("packs")) == 4
    for blocks in (left, right):
        assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    tier.close()


def test_requests_are_few(s3_bucket: S3Place) -> None:
    """64 neighbouring blocks: a GET per pack or 16 MiB; a miss: none; never a HEAD."""
    blocks = chain(2 * WINDOW, size=400_000)
    writer = s3_bucket.tier(config=s3_bucket.config(index_refresh=3600))
    writer.write(blocks)
    assert writer.flush(60)
    written = writer.stats()
    # The namespace document, a PUT per pack, and one index segment.
    assert written["put_requests"] <= 1 + 2 + 1
    writer.close()

    reader = s3_bucket.tier(config=s3_bucket.config(index_refresh=3600))
    eventually(lambda: reader.stats()["index_rebuilds"])
    before = reader.stats()
    # The namespace document and the segment; packs that segments list are not looked at.
    assert before["get_requests"] == 2
    assert reader.match(hashes_of(blocks)) == len(blocks)
    assert reader.match([b"?" * 16]) == 0
    strangers = [bytes([number]) * 16 for number in range(50)]
    assert read_all(reader, strangers) == dict.fromkeys(strangers)
    assert reader.stats() == {**before, "blocks_missed": 50}

    assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    after = reader.stats()
    size = sum(len(block.payload) for block in blocks)
    assert after["get_requests"] - before["get_requests"] <= math.ceil(size / RANGE_BYTES[0]) + 1
    assert after["get_bytes"] - before["get_bytes"] == size
    for kind in ("put_requests", "list_requests"):
        assert after[kind] == before[kind]
    reader.close()


def test_a_part_of_a_pack_is_fetched_without_the_rest(s3_bucket: S3Place) -> None:
    blocks = chain(WINDOW, size=100_000)
    tier = s3_bucket.tier(config=s3_bucket.config(index_refresh=3600))
    tier.write(blocks)
    assert tier.flush(60)
    before = tier.stats()
    wanted = [*blocks[2:5], *blocks[20:22]]
    assert read_all(tier, hashes_of(wanted)) == payloads_of(wanted)
    after = tier.stats()
    assert after["get_requests"] - before["get_requests"] == 2
    assert after["get_bytes"] - before["get_bytes"] == sum(len(block.payload) for block in wanted)
    tier.close()


def test_a_lost_index_is_rebuilt_from_footers(s3_bucket: S3Place) -> None:
    blocks = chain(3 * WINDOW + 2, size=2_000)
    writer = s3_bucket.tier()
    writer.write(blocks)
    assert writer.flush(60)
    writer.close()
    s3_bucket.delete(s3_bucket.keys("index"))

    second = s3_bucket.tier()
    eventually(lambda: second.match(hashes_of(blocks)) == len(blocks))
    assert read_all(second, hashes_of(blocks)) == payloads_of(blocks)
    assert second.stats()["packs_recovered"] == len(s3_bucket.keys("packs"))
    second.close()
    assert len(s3_bucket.keys("index")) == 1
    third = s3_bucket.tier()
    assert third.match(hashes_of(blocks)) == len(blocks)
    third.close()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_corrupt_segments_cost_nothing_but_time(s3_bucket: S3Place, damage: str) -> None:
    blocks = chain(WINDOW + 2, size=2_000)
    writer = s3_bucket.tier()
    writer.write(blocks)
    assert writer.flush(60)
    writer.close()
    segments = s3_bucket.keys("index")
    for key in segments:
        body = s3_bucket.get(key)
        middle = len(body) // 2
        damaged = {
            "truncated": body[:middle],
            "flipped": body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :],
            "empty": b"",
            "foreign": b"<html>" * 1000,
        }
        s3_bucket.put(key, damaged[damage])
    reader = s3_bucket.tier()
    eventually(lambda: reader.match(hashes_of(blocks)) == len(blocks))
    assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    assert reader.stats()["index_segments_corrupt"] == len(segments)
    assert not reader.stats()["breaker_open"]
    reader.close()


def test_corrupt_and_foreign_packs_are_left_out_of_a_rebuilt_index(s3_bucket: S3Place) -> None:
    good, bad = chain(WINDOW, size=2_000), chain(WINDOW, size=2_000, seed=2)
    writer = s3_bucket.tier()
    writer.write(bad)
    assert writer.flush(60)
    [spoilt] = s3_bucket.keys("packs")
    writer.write(good)
    assert writer.flush(60)
    writer.close()
    body = s3_bucket.get(spoilt)
    s3_bucket.put(spoilt, body[:-40] + b"\0" * 4 + body[-36:])
    packs = spoilt.rsplit("/", 2)[0]
    s3_bucket.put(f"{packs}/00/{'00' * 16}.kvp", b"not a pack")
    s3_bucket.put(f"{packs}/readme.txt", b"what is this?")
    s3_bucket.delete(s3_bucket.keys("index"))

    reader = s3_bucket.tier()
    eventually(lambda: reader.stats()["index_rebuilds"])
    assert reader.match(hashes_of(good)) == WINDOW
    assert reader.match(hashes_of(bad)) == 0
    assert reader.stats()["packs_corrupt"] == 2
    reader.close()


def test_namespaces_share_a_bucket_and_do_not_see_each_other(s3_bucket: S3Place) -> None:
    blocks = chain(WINDOW, size=2_000)
    tier = s3_bucket.tier()
    tier.write(blocks)
    assert tier.flush(60)
    stranger = S3Tier(s3_bucket.config(), Namespace.from_facts({"model": "another"}), LAYOUT, MAX_BYTES)
    assert stranger.wait_ready(30)
    eventually(lambda: stranger.stats()["index_rebuilds"])
    assert stranger.match(hashes_of(blocks)) == 0
    stranger.close()
    tier.close()


def test_namespace_document_is_readable_and_checked(s3_bucket: S3Place) -> None:
    s3_bucket.tier().close()
    [key] = s3_bucket.keys("namespace")
    assert key == f"{s3_bucket.prefix}/{NAMESPACE.hex}/namespace.json"
    assert json.loads(s3_bucket.get(key)) == json.loads(NAMESPACE.document())
    again = s3_bucket.tier()
    again.close()
    s3_bucket.put(key, b'{"id": "something else"}')
    refused = s3_bucket.tier(ready=False)
    eventually(lambda: refused.stats()["namespace_mismatches"])
    assert not refused.stats()["ready"]
    refused.close(0)


def test_wrong_keys_and_missing_buckets_are_misses_that_say_what_to_do(
    s3_bucket: S3Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KVTIER_TEST_WRONG", "wrong")
    wrong = s3_bucket.config(secret_key_env="KVTIER_TEST_WRONG")
    unset = s3_bucket.config(secret_key_env="KVTIER_TEST_UNSET")
    missing = s3_bucket.config(bucket="kvtier-no-such-bucket")
    for config, advice in (
        (wrong, "secret key"),
        (unset, "KVTIER_TEST_UNSET"),
        (missing, "create the bucket"),
    ):
        monkeypatch.setattr("kvtier._logging._last", {})
        tier = s3_bucket.tier(ready=False, config=config)
        eventually(lambda tier=tier: tier.stats().get("errors_denied"))
        eventually(lambda tier=tier: tier.stats()["breaker_open"])
        assert tier.match([b"?" * 16]) == 0
        assert read_all(tier, [b"?" * 16]) == {b"?" * 16: None}
        assert tier.write(chain(1)) == 1
        assert not tier.flush(0)
        eventually(lambda advice=advice: advice in caplog.text)
        tier.close(0)
    assert s3_bucket.server.secret_key not in caplog.text


def test_a_bucket_that_appears_later_is_used_without_a_restart(s3_bucket: S3Place) -> None:
    late = f"late-{s3_bucket.prefix}"
    tier = s3_bucket.tier(ready=False, config=s3_bucket.config(bucket=late), longest_pause=0.2)
    blocks = chain(WINDOW, size=1_000)
    tier.write(blocks)
    eventually(lambda: tier.stats()["breaker_open"])
    s3_bucket.server.create_bucket(late)
    assert tier.flush(60)
    assert tier.match(hashes_of(blocks)) == WINDOW
    assert late != BUCKET
    tier.close()


def test_one_dead_endpoint_costs_nothing_but_misses(s3_bucket: S3Place) -> None:
    tier = s3_bucket.tier(ready=False, config=s3_bucket.config(endpoint="http://127.0.0.1:1"))
    eventually(lambda: tier.stats()["breaker_open"])
    assert tier.match([b"?" * 16]) == 0
    assert read_all(tier, [b"?" * 16]) == {b"?" * 16: None}
    tier.close(0)
