"""The S3 tier over a bucket in memory, which behaves in ways that a real server seldom shows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from kvtier.config import S3Config
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier
from tests.s3_support import (
    LAYOUT,
    MAX_BYTES,
    NAMESPACE,
    FakeBucket,
    eventually,
)


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
