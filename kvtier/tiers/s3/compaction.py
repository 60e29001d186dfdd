"""Compacting index segments: many small ones become few large ones, and go after a time of grace.

Any node may do it, without a coordinator. A claim written on the condition that it is new keeps two nodes
from doing the same work in the same hour; where the server knows no conditions both do it: that is harmless.
What a large segment says, the small ones said; they are deleted only once it has been there for an hour and
reads well. A node that dies anywhere leaves at worst segments that say the same thing twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.errors import AccessDenied, CorruptBlock, TierError
from kvtier.tiers.s3.bucket import Bucket, ListedObject, ObjectMissing
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import MAX_SEGMENT_BYTES, read_segment, write_segments
from kvtier.tiers.s3.tombstone import MAX_TOMBSTONE_BYTES, Tombstone, read_tombstone

_logger = logging.getLogger(__name__)

FEWEST_SEGMENTS = 64
"""Fewer small segments than this are left alone."""
SMALL_BYTES = 8 << 20
_SECOND = 1_000_000_000
_SETTLED = 120 * _SECOND
"""Younger segments are left alone: others are just about to read them."""
GRACE = 3600 * _SECOND
"""How long small segments stay beside the large one; S3 allows clocks to differ by a quarter of it."""
_GRAVE_AGE = 2 * GRACE
"""Younger tombstones are kept: nodes must not take what they name for packs that no segment lists."""
_CLAIM_SECONDS = 3600
_MAX_RECORD_BYTES = 16 << 20


class Compactor:
    """Compacts the index segments of one namespace."""

    def __init__(
        self,
        bucket: Bucket,
        keys: Keys,
        namespace: bytes,
        max_block_bytes: int,
        counters: Counters,
        clock: Callable[[], int] = time.time_ns,
    ):
        """Prepare.

        Args:
            bucket: Where the segments lie.
            keys: Names of the objects.
            namespace: The namespace's id.
            max_block_bytes: No payload is longer.
            counters: Gets `index_segments_compacted` and `index_segments_deleted`.
            clock: Nanoseconds since 1970.
        """
        self._bucket = bucket
        self._keys = keys
        self._namespace = namespace
        self._max_block_bytes = max_block_bytes
        self._counters = counters
        self._clock = clock

    def run(self) -> None:
        """Compact what is worth it, and delete what an earlier compaction has made superfluous.

        Does nothing where the credentials may not delete.

        Raises:
            TierError: The bucket does not answer.
        """
        try:
            self._sweep()
            self._compact()
        except AccessDenied as error:
            log_once(_logger, "denied", "index segments are not compacted: %s", error)

    def _compact(self) -> None:
        settled = self._clock() - _SETTLED
        items = [
            item
            for item in self._bucket.list(self._keys.index)
            if (self._keys.index_time(item.key) or settled) < settled
        ]
        if sum(item.size <= SMALL_BYTES for item in items) < FEWEST_SEGMENTS or not self._claim():
            return
        graves = {
            item.key
            for item in items
            if self._keys.tombstone_salt(item.key) is not None
            and (self._keys.index_time(item.key) or 0) < self._clock() - _GRAVE_AGE
        }
        # Before a tombstone may go, every segment that may list what it names must be written anew.
        chosen = [item for item in items if graves or item.size <= SMALL_BYTES]
        # What is corrupt stays: whoever meets it rebuilds the index from the packs.
        read = [(item, found) for item in chosen if (found := self._read(item)) is not None]
        replaced = [item for item, found in read if item.key in graves or not isinstance(found, Tombstone)]
        if len(replaced) < FEWEST_SEGMENTS:
            return
        # They sort right behind the newest of what they replace: what was written later still comes later.
        newest = max(self._keys.index_time(item.key) or 0 for item in replaced)
        large = []
        for body in write_segments(_latest([found for _, found in read]), self._namespace):
            large.append(self._keys.new_segment(newest + 1))
            self._bucket.put(large[-1], body)
        record = {"large": large, "small": [item.key for item in replaced]}
        self._bucket.put(self._keys.new_compaction(self._clock()), json.dumps(record).encode())
        self._counters.add("index_segments_compacted", len(replaced))

    def _claim(self) -> bool:
        hour = self._clock() // _SECOND // _CLAIM_SECONDS
        return self._bucket.put(self._keys.compaction_claim(hour), b"{}")

    def _sweep(self) -> None:
        expired = self._clock() - GRACE
        old_claims = self._keys.compaction_claim(max(0, expired // _SECOND // _CLAIM_SECONDS - 1))
        for item in self._bucket.list(self._keys.compactions):
            written = self._keys.compaction_time(item.key)
            if written is None or written > expired:
                if item.key.startswith(self._keys.compactions + "claim-") and item.key < old_claims:
                    self._bucket.delete(item.key)
                continue
            large, small = self._record(item)
            if all(self._reads_well(key) for key in large):
                for key in small:
                    self._bucket.delete(key)
                self._counters.add("index_segments_deleted", len(small))
            # Where a large one is lost, the small ones stay, and are compacted again.
            self._bucket.delete(item.key)

    def _record(self, item: ListedObject) -> tuple[Sequence[str], Sequence[str]]:
        """Return the large and the small segments of a compaction, none where its record is of no use."""
        try:
            if not 0 < item.size <= _MAX_RECORD_BYTES:
                return (), ()
            data = bytearray(item.size)
            self._bucket.get_range(item.key, 0, memoryview(data))
            record = json.loads(data)
            large, small = record["large"], record["small"]
        except (ObjectMissing, ValueError, KeyError, TypeError, RecursionError):
            return (), ()
        if not isinstance(large, list) or not isinstance(small, list):
            return (), ()
        # A record names segments of this namespace, or nothing that we touch.
        times = [self._keys.index_time(key) if isinstance(key, str) else None for key in large + small]
        known = None not in times and not set(large) & set(small)
        return (large, small) if large and known else ((), ())

    def _reads_well(self, key: str) -> bool:
        found = [item for item in self._bucket.list(key) if item.key == key]
        return bool(found) and self._read(found[0]) is not None

    def _read(self, item: ListedObject) -> PackTable | Tombstone | None:
        buries = self._keys.tombstone_salt(item.key) is not None
        try:
            if not 0 < item.size <= (MAX_TOMBSTONE_BYTES if buries else MAX_SEGMENT_BYTES):
                return None
            data = bytearray(item.size)
            self._bucket.get_range(item.key, 0, memoryview(data))
            if buries:
                return read_tombstone(data, self._namespace)
            return read_segment(data, self._namespace, self._max_block_bytes)
        except (ObjectMissing, CorruptBlock):
            return None


def compact_quietly(compactor: Compactor) -> None:
    """Run in the background: a failure means that it is done another time."""
    try:
        compactor.run()
    except (TierError, CorruptBlock) as error:
        log_once(_logger, "failed", "index segments could not be compacted: %s", error)


def _latest(found: Sequence[PackTable | Tombstone]) -> PackTable:
    """Join tables in order; of two entries for one pack the later one holds, if no tombstone follows."""
    places: dict[bytes, int] = {}
    tables: list[PackTable] = []
    start = 0
    for table in found:
        if isinstance(table, Tombstone):
            for name in table.names:
                places.pop(name, None)
        else:
            places.update({name: place for place, name in enumerate(table.names(), start)})
            tables.append(table)
            start += len(table)
    return PackTable.join(tables).take(sorted(places.values()))
