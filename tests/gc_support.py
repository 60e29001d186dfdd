"""A namespace to collect garbage in: a bucket in memory whose clock a test sets, and packs put by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from kvtier.hashing import HASH_BYTES
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3.gc import Collector, Done, Plan
from kvtier.tiers.s3.heat import HeatLog
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import NoLease
from kvtier.tiers.s3.pack import Pack, write_pack
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import write_segments
from kvtier.tiers.s3.survey import take_survey
from tests.s3_support import NAMESPACE, WINDOW, FakeBucket

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
