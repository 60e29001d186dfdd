"""Warming up: what is chosen, in which order, and what is kept; and upkeep where there can be no lease."""

from __future__ import annotations

import threading

import pytest

from kvtier.config import S3Config
from kvtier.errors import CorruptBlock
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.heat import Use
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.pace import Pace
from kvtier.tiers.s3.pack import Pack, write_pack
from kvtier.tiers.s3.warm import Warmer, hottest, prefix
from tests.s3_support import LAYOUT, MAX_BYTES, NAMESPACE, WINDOW, FakeBucket, chain, eventually, hashes_of
from tests.store_support import DictTier

NOW = 1e9


def packs_of(blocks: list, *cuts: int) -> list[Pack]:
    edges = [0, *cuts, len(blocks)]
    return [
        write_pack(blocks[start:end], NAMESPACE.id)[1]
        for start, end in zip(edges, edges[1:], strict=False)  # noqa: RUF007 - pairs of edges
    ]


def test_the_hottest_come_first_each_after_its_beginning() -> None:
    cold, warm, hot = (chain(12, size=100, seed=seed) for seed in range(3))
    index = BlockIndex()
    packs = {name: packs_of(blocks, 4, 8) for name, blocks in (("c", cold), ("w", warm), ("h", hot))}
    for group in packs.values():
        index.add(group[::-1])
    uses = {warm[5].hash: Use(2.0, NOW), hot[-1].hash: Use(9.0, NOW), b"?" * 16: Use(99.0, NOW)}
    order = [wanted.hashes for wanted in hottest(index, uses, NOW, 1 << 30)]
    expected = [*packs["h"], *packs["w"][:2]]
    assert order[:5] == [pack.hashes for pack in expected]
    assert len(order) == 9
    for group in packs.values():
        places = [order.index(pack.hashes) for pack in group]
        assert places == sorted(places)
    limit = sum(pack.size for pack in expected)
    assert [wanted.hashes for wanted in hottest(index, uses, NOW, limit)] == order[:5]
    assert hottest(index, {}, NOW, 10) == []
    # A use long ago is worth less than a recent one.
    aged = {warm[5].hash: Use(2.0, NOW), hot[-1].hash: Use(9.0, NOW - 30 * 86_400)}
    assert hottest(index, aged, NOW, 1 << 30)[0].hashes == packs["w"][0].hashes


def test_a_beginning_that_many_share_is_as_hot_as_they_are_together() -> None:
    common = chain(4, size=100)
    ends = [chain(8, size=100, seed=seed, prefix=common) for seed in (5, 6)]
    other = chain(4, size=100, seed=7)
    index = BlockIndex()
    shared = packs_of(common)
    index.add(shared)
    index.add([packs_of(end, 4)[1] for end in ends])
    index.add(packs_of(other))
    uses = {end[-1].hash: Use(4.0, NOW) for end in ends} | {other[-1].hash: Use(6.0, NOW)}
    order = [wanted.hashes for wanted in hottest(index, uses, NOW, 1 << 30)]
    assert order[:2] == [shared[0].hashes, tuple(hashes_of(other))]


def test_short_packs_that_a_whole_one_replaces_are_not_brought() -> None:
    blocks = chain(WINDOW, size=100)
    index = BlockIndex()
    index.add(packs_of(blocks, 4, 9))
    index.add(packs_of(blocks))
    [wanted] = hottest(index, {}, NOW, 1 << 30)
    assert wanted.hashes == tuple(hashes_of(blocks))


def test_of_a_prompt_what_the_bucket_has() -> None:
    blocks = chain(10, size=100)
    index = BlockIndex()
    index.add(packs_of(blocks[:6]))
    found = prefix(index, hashes_of(blocks), blocks[0].parent)
    assert found is not None
    assert found.hashes == tuple(hashes_of(blocks[:6]))
    assert found.size == sum(len(block.payload) for block in blocks[:6])
    assert prefix(index, [b"?" * 16], b"r" * 16) is None


def test_corrupt_and_missing_blocks_are_not_kept() -> None:
    blocks = chain(6, size=100)
    index = BlockIndex()
    index.add(packs_of(blocks))
    source, sink = DictTier("s3"), DictTier("disk")
    source.blocks = {block.hash: bytes(block.payload) for block in blocks}
    source.lost = {blocks[4].hash}
    sink.blocks = {blocks[0].hash: bytes(blocks[0].payload)}

    def verify(payload: object, block_hash: bytes, namespace: bytes) -> None:
        if block_hash == blocks[2].hash:
            raise CorruptBlock("no")

    seen: list[int] = []
    warmer = Warmer(source, sink, NAMESPACE.id, verify=verify)
    wanted = hottest(index, {}, NOW, 1 << 30)
    warmed = warmer.run(wanted, seen.append)
    assert (warmed.blocks, warmed.held, warmed.failed) == (3, 1, 2)
    assert set(sink.blocks) == {blocks[n].hash for n in (0, 1, 3, 5)}
    assert source.discarded == [blocks[2].hash]
    assert blocks[0].hash not in source.reads
    assert seen == [wanted[0].size]


def test_a_rate_holds_for_every_half_second_and_nothing_rests_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is fetched at once is no more than the rate allows in half a second, however large packs are."""
    blocks = chain(3 * WINDOW + 5, size=1000)
    index = BlockIndex()
    index.add(packs_of(blocks, WINDOW, 2 * WINDOW))
    source, sink = DictTier("s3"), DictTier("disk")
    source.blocks = {block.hash: bytes(block.payload) for block in blocks}
    total = sum(len(block.payload) for block in blocks)

    class Rests(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            rests.append(timeout or 0.0)
            return False

    rests: list[float] = []
    monkeypatch.setattr("kvtier.tiers.s3.warm.Pace", lambda rate: Pace(rate, lambda: 0.0))
    seen: list[int] = []
    warmer = Warmer(
        source,
        sink,
        NAMESPACE.id,
        bytes_per_second=10_000,
        verify=lambda payload, block_hash, namespace: None,
        stop=Rests(),
    )
    wanted = hottest(index, {}, NOW, 1 << 30)
    assert warmer.run(wanted, seen.append).blocks == len(blocks)
    assert sink.blocks == source.blocks
    assert sum(seen) == sum(part.size for part in wanted)
    # 5,000 bytes at once: five blocks or so.
    assert max(seen) < 6_000
    # The clock stands still, so each rest is until all before it is paid for; none comes after the last.
    assert len(rests) == len(seen)
    assert rests[0] == 0
    assert total * 0.9 / 10_000 < rests[-1] < total / 10_000


def test_a_pace_rests_so_long_and_saves_nothing_up() -> None:
    now = [0.0]
    pace = Pace(100.0, lambda: now[0])
    assert pace.rest(50) == 0.5
    assert pace.rest(100) == 1.5
    now[0] = 10.0
    assert pace.rest(100) == 0.0
    assert pace.rest(100) == 1.0
    assert Pace(None).rest(1 << 40) == 0.0


def test_without_conditional_put_a_node_collects_nothing_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvtier.tiers.s3.upkeep.COLLECT_SECONDS", 0.05)
    monkeypatch.setattr("kvtier._logging._last", {})
    bucket = FakeBucket()
    bucket.conditional = False
    config = S3Config(bucket="in-memory", index_refresh=0.1, quota=1 << 20)
    tier = S3Tier(config, NAMESPACE, LAYOUT, MAX_BYTES, bucket=bucket)
    blocks = chain(2 * WINDOW, size=40_000)
    tier.write(blocks)
    assert tier.flush(30)
    eventually(lambda: "--no-lease" in caplog.text)
    tries = bucket.count("put", "/gc/lease-")
    assert tier.match(hashes_of(blocks)) == 2 * WINDOW
    tier.close(5)
    assert bucket.count("put", "/gc/lease-") == tries == 2
    assert bucket.count("delete", "/packs/") == 0
