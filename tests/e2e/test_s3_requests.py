"""Requests as the server sees them: counted by a proxy before it, not by the client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.faults.s3_proxy import FaultyProxy
from tests.s3_support import LAYOUT, WINDOW, S3Place, chain, eventually, hashes_of, payloads_of, read_all

TOKENS = 65_536


@pytest.fixture
def counted(s3_bucket: S3Place) -> Iterator[tuple[FaultyProxy, Counter[str]]]:
    counts: Counter[str] = Counter()

    def count(method: str, path: str, headers: dict[str, str]) -> None:
        kind = "LIST" if "list-type" in path else method
        counts[f"{kind} {'packs' if '.kvp' in path else 'index' if 'kvi' in path else 'other'}"] += 1

    with FaultyProxy(s3_bucket.server.endpoint) as proxy:
        proxy.choose = count
        yield proxy, counts


def test_a_prefix_of_64k_tokens(s3_bucket: S3Place, counted: tuple[FaultyProxy, Counter[str]]) -> None:
    """At most 70 PUTs to save it, none to look it up, 70 GETs to load it, never a HEAD; a miss is free."""
    proxy, counts = counted
    config = s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600, concurrency=32)
    blocks = chain(TOKENS // LAYOUT.tokens_per_block, size=1_500)
    writer = s3_bucket.tier(config=config)
    counts.clear()
    assert writer.write(blocks) == len(blocks)
    assert writer.flush(60)
    writer.close()
    assert counts["PUT packs"] == len(blocks) // WINDOW <= 70
    assert counts["PUT index"] <= 10
    assert set(counts) == {"PUT packs", "PUT index"}

    reader = s3_bucket.tier(config=config)
    counts.clear()
    assert reader.match(hashes_of(blocks)) == len(blocks)
    assert reader.match([bytes(16)]) == 0
    assert read_all(reader, [bytes(16)]) == {bytes(16): None}
    assert not counts
    assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    assert set(counts) == {"GET packs"}
    # On a busy machine late replies are asked for a second time, within the hedges' share.
    assert len(blocks) // WINDOW <= counts["GET packs"] <= 70
    reader.close()


def test_a_chain_that_grows_slowly_becomes_whole_packs(
    s3_bucket: S3Place, counted: tuple[FaultyProxy, Counter[str]]
) -> None:
    """Generation completes one block after the other; each comes well before its window has waited enough."""
    proxy, counts = counted
    writer = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600))
    blocks = chain(2 * WINDOW, size=500)
    counts.clear()
    for block in blocks:
        assert writer.write([block]) == 1
    eventually(lambda: counts["PUT packs"] == 2)
    assert writer.flush(60)
    assert counts["PUT packs"] == 2
    writer.close()


def test_a_compacted_index_is_read_with_few_requests(
    s3_bucket: S3Place, counted: tuple[FaultyProxy, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, counts = counted
    monkeypatch.setattr("kvtier.tiers.s3.compaction.FEWEST_SEGMENTS", 5)
    monkeypatch.setattr("kvtier.tiers.s3.compaction._SETTLED", 0)
    config = s3_bucket.config(index_refresh=3600)
    writer = s3_bucket.tier(config=config)
    chains = [chain(3, size=100, seed=seed) for seed in range(8)]
    for blocks in chains:
        writer.write(blocks)
        assert writer.flush(60)
    assert len(s3_bucket.keys("index")) == len(chains)
    writer.compact_index()
    monkeypatch.setattr("kvtier.tiers.s3.compaction.GRACE", 0)
    writer.compact_index()
    assert len(s3_bucket.keys("index")) == 1
    for _ in range(2):
        reader = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600))
        assert counts["GET index"] == 1
        assert counts["GET packs"] == 0
        for blocks in chains:
            assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
        reader.close()
        counts.clear()
        assert writer.refresh()
    writer.close()
