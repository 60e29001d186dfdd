"""Garbage to collect: in a bucket in memory whose clock a test sets, or on a real server."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any

import pytest

from kvtier._counters import Counters
from kvtier.hashing import HASH_BYTES
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.bucket import Bucket
from kvtier.tiers.s3.gc import Collector, Done, Plan
from kvtier.tiers.s3.heat import HeatLog
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import NoLease
from kvtier.tiers.s3.open_bucket import open_bucket
from kvtier.tiers.s3.pack import Pack, write_pack
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import write_segments
from kvtier.tiers.s3.survey import take_survey
from tests.s3_support import NAMESPACE, WINDOW, FakeBucket, S3Place

HOUR = 3600.0
KEYS = Keys("p", NAMESPACE.hex)


class Yard:
    """The bucket, and a clock that starts long after 1970."""

    def __init__(self) -> None:
        self.now = 1.6e9
        self.bucket = FakeBucket()
        self.bucket.clock = lambda: self.now

    def store(self, blocks: Sequence[StoredBlock], *, publish: bool = True, salt: bytes = b"") -> Pack:
        """Put blocks of one chain there as one pack."""
        body, pack = write_pack(list(blocks), NAMESPACE.id, salt)
        self.bucket.put(KEYS.pack(pack.name), body)
        if publish:
            self.publish(pack)
        return pack

    def store_chain(self, blocks: Sequence[StoredBlock], *cuts: int) -> list[Pack]:
        """Put a chain there, cut at these places."""
        edges = [0, *cuts, len(blocks)]
        return [self.store(blocks[start:end]) for start, end in itertools.pairwise(edges)]

    def publish(self, *packs: Pack) -> None:
        [body] = write_segments(PackTable.of(packs), NAMESPACE.id)
        self.bucket.put(KEYS.new_segment(int(self.now * 1e9)), body)

    def use(self, *hashes: bytes) -> None:
        """Leave a summary that says that these were used just now."""
        log = HeatLog(lambda: 0.0)
        for block in hashes:
            assert len(block) == HASH_BYTES
            log.note(block)
        self.now += 1
        log.write(self.bucket, KEYS, NAMESPACE.id)

    def collector(self, **settings: Any) -> Collector:
        options: dict[str, Any] = {
            "windows": {NAMESPACE.hex: WINDOW},
            "verify": lambda payload, block_hash, namespace: None,
            **settings,
        }
        return Collector(self.bucket, "p", **options)

    def plan(self, **settings: Any) -> Plan:
        return self.collector(**settings).plan()

    def collect(self, **settings: Any) -> Done:
        collector = self.collector(**settings)
        return collector.carry_out(collector.plan(), NoLease())

    def there(self, pack: Pack) -> bool:
        """Whether a pack's object exists."""
        return KEYS.pack(pack.name) in self.bucket.objects

    def listed(self) -> set[bytes]:
        """The names of the packs that a node which starts now would know."""
        return set(take_survey(self.bucket, "p", NAMESPACE.hex).index.names())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let seconds be enough where collectors wait for minutes, and nodes look far back more often."""
    monkeypatch.setattr("kvtier.tiers.s3.survey.SETTLED_SECONDS", 1.0)
    monkeypatch.setattr("kvtier.tiers.s3.merge.SETTLED_SECONDS", 1.0)
    monkeypatch.setattr("kvtier.tiers.s3.survey.LOST_SECONDS", 4.0)
    monkeypatch.setattr("kvtier.tiers.s3.catalog._WIDE_POLL_SECONDS", 0.1)


def collector(place: S3Place, bucket: Bucket | None = None, **settings: Any) -> Collector:
    """Make one on a real server, for blocks that are no encoded ones."""
    options: dict[str, Any] = {
        "windows": {NAMESPACE.hex: WINDOW},
        "verify": lambda payload, block_hash, namespace: None,
        **settings,
    }
    return Collector(bucket or open_bucket(place.config(), Counters()), place.prefix, **options)


def grow(tier: S3Tier, blocks: Sequence[StoredBlock], *ends: int) -> None:
    """Write a chain as a conversation does: each turn's end is a short pack."""
    for start, end in zip((0, *ends), (*ends, len(blocks)), strict=True):
        tier.write(blocks[start:end])
        assert tier.flush(60)


def time_between(place: S3Place) -> float:
    """Return a time of the server's: in listings all before is older, and all that comes is younger."""
    time.sleep(2.1)
    clock = open_bucket(place.config(), Counters())
    assert list(clock.list(f"{place.prefix}/"))
    moment = clock.server_time()
    time.sleep(2.1)
    return moment
