"""Keeping the block index in step with the bucket: connect, load, poll, publish, and rebuild from footers."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import CancelledError
from functools import partial
from itertools import islice
from typing import TypeVar

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.errors import AccessDenied, CorruptBlock, TierUnavailable
from kvtier.hashing import Namespace
from kvtier.tiers.s3.bucket import Bucket, ListedObject, ObjectMissing
from kvtier.tiers.s3.compaction import Compactor, compact_quietly
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, Pack, read_footer
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import MAX_SEGMENT_BYTES, read_segment, write_segments
from kvtier.tiers.s3.tombstone import MAX_TOMBSTONE_BYTES, Tombstone, free_salt, read_tombstone

A = TypeVar("A")
B = TypeVar("B")

_logger = logging.getLogger(__name__)

_LOADERS = 8
_AHEAD = 2 * _LOADERS
"""What is loaded waits for its turn in the index: no more of it than this, for a segment may be 64 MiB."""
_FOOTER_BATCH = 4096
_REBUILD_PAUSE = (30.0, 3600.0)
"""Seconds until a rebuild that failed is tried again; doubles from the first to the last."""
_SECOND = 1_000_000_000
_USUAL_SKEW = 60 * _SECOND
"""Clocks that run by NTP differ by less; every poll looks this far back."""
_LARGEST_SKEW = 15 * 60 * _SECOND
"""S3 refuses signatures of clocks that differ by more; one poll a minute looks this far back."""
_WIDE_POLL_SECONDS = 60.0
_COMPACT_SECONDS = (600.0, 1800.0)
"""Compaction is thought of about so often; each node at times of its own."""
_MAX_NAMESPACE_BYTES = 1 << 20
_MAX_CONDEMNED = 262_144
"""Names of condemned packs that are remembered; the oldest are long deleted."""


class Catalog:
    """Owns the background thread that makes the index of this process follow the bucket's."""

    def __init__(
        self,
        bucket: Bucket,
        keys: Keys,
        namespace: Namespace,
        index: BlockIndex,
        reading: Health,
        writing: Health,
        counters: Counters,
        max_block_bytes: int,
        refresh_seconds: float,
        on_ready: Callable[[], None],
        clock: Callable[[], int] = time.time_ns,
    ):
        """Prepare; `start` runs the thread, which calls `on_ready` once the index is loaded.

        Args:
            bucket: Where the index lies.
            keys: Names of the objects.
            namespace: Whose index it is.
            index: What to keep in step.
            reading: Health of that direction; its breaker is probed by the thread.
            writing: Health of the other.
            counters: Gets what happened.
            max_block_bytes: No payload is longer; packs that list longer ones are corrupt.
            refresh_seconds: Seconds between polls.
            on_ready: Called once.
            clock: Nanoseconds since 1970, as this node has them.
        """
        self._bucket = bucket
        self._keys = keys
        self._namespace = namespace
        self._index = index
        self._reading = reading
        self._writing = writing
        self._counters = counters
        self._max_block_bytes = max_block_bytes
        self._refresh_seconds = refresh_seconds
        self._on_ready = on_ready
        self._clock = clock
        self.ready = threading.Event()
        self._stop = False
        self._wake = threading.Event()
        self._pool = Workers("s3-load", _LOADERS)
        self._thread = threading.Thread(target=self._run, name="kvtier-s3-index", daemon=True)
        self._polling = threading.Lock()
        self._wide_poll_at = 0.0
        self._newest = 0
        self._seen_lock = threading.Lock()
        self._seen: set[str] = set()
        self._condemned: dict[bytes, bytes] = {}
        self._rebuild_at: float | None = None
        self._rebuild_pause = _REBUILD_PAUSE[0]
        self._compactor = Compactor(bucket, keys, namespace.id, max_block_bytes, counters, clock)
        self._compact_at = time.monotonic() + random.uniform(*_COMPACT_SECONDS)  # noqa: S311 - not for secrets

    def start(self) -> None:
        """Run the background thread."""
        self._thread.start()

    def close(self) -> None:
        """Let the thread end; a request that it waits for is not waited for."""
        self._stop = True
        self._wake.set()
        self._pool.close(cancel=True)

    def wake(self) -> None:
        """Let the thread look at the breaker now, which has opened: it is the one that probes."""
        self._wake.set()

    def refresh(self) -> None:
        """Load the index segments that have appeared since the last look.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        with self._polling, self._reading.watched():
            now = time.monotonic()
            wide = now >= self._wide_poll_at
            # A segment from the future, by a wrong clock, must not hide those of the present.
            newest = min(self._newest, self._clock())
            start = self._keys.segments_from(newest - (_LARGEST_SKEW if wide else _USUAL_SKEW))
            self._load(self._bucket.list(self._keys.index, start))
            if wide:
                self._wide_poll_at = now + _WIDE_POLL_SECONDS
                with self._seen_lock:
                    self._seen = {key for key in self._seen if key > start}

    def publish(self, packs: PackTable) -> None:
        """Write index segments that list `packs`.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        for body in write_segments(packs, self._namespace.id):
            key = self._keys.new_segment(self._clock())
            self._bucket.put(key, body)
            with self._seen_lock:
                self._seen.add(key)
            self._counters.add("index_segments_written")

    def salt_for(self, hashes: Sequence[bytes]) -> bytes:
        """Return the salt of the name to store a pack of these blocks under; see `free_salt`."""
        with self._seen_lock:
            return free_salt(hashes, self._condemned)

    def read_pack(self, name: bytes) -> Pack:
        """Read a pack's footer from the bucket.

        Raises:
            ObjectMissing: There is no such pack.
            CorruptBlock: The object is not a pack of this namespace, or altered.
            TierError: The bucket does not answer or refuses.
        """
        try:
            tail, size = self._bucket.get_tail(self._keys.pack(name), MAX_TAIL_BYTES)
            return read_footer(tail, size, name, self._namespace.id, self._max_block_bytes)
        except CorruptBlock as error:
            self._counters.add("packs_corrupt")
            log_once(_logger, "pack", "%s", error)
            raise

    def rebuild(self, indexed: Set[bytes] | None = None) -> int:
        """Find the packs that no readable index segment lists, index them by their footers, and publish them.

        Args:
            indexed: Names of the packs that segments list, as they were just loaded for the first time: what
                this process has come to know since is listed, or about to be by whoever stored it. None to
                read all segments again.

        Returns:
            How many packs were found that way.

        Raises:
            TierError: The bucket does not answer or refuses; what was found until then is kept.
        """
        # A table has a fifth of the bytes of its packs.
        recovered: list[PackTable] = []
        with self._reading.watched():
            lost = self._find_lost(indexed)
            while batch := list(islice(lost, _FOOTER_BATCH)):
                packs = [pack for pack in self._map(self._recover, batch) if pack is not None]
                recovered.append(PackTable.of(packs))
                self._index.add(packs)
        # A bucket that may only be read is served all the same: that is the other direction's health.
        found = PackTable.join(recovered)
        if len(found):
            self._go_on()
            with self._writing.watched():
                self.publish(found)
        self._counters.add("packs_recovered", len(found))
        self._counters.add("index_rebuilds")
        return len(found)

    def _find_lost(self, indexed: Set[bytes] | None) -> Iterator[bytes]:
        first = indexed is not None
        if indexed is None:
            indexed = self._load(self._bucket.list(self._keys.index), again=True)
        for item in self._bucket.list(self._keys.packs):
            name = self._keys.pack_name(item.key)
            if name is None or name in indexed:
                continue
            if not (first and self._index.pack(name) is not None):
                yield name

    def _go_on(self) -> None:
        """Raise TierUnavailable if the tier is being closed: nothing is written behind its owner's back."""
        if self._stop:
            raise TierUnavailable("the tier is being closed")

    def _run(self) -> None:
        while not self._stop:
            if self._reading.breaker.try_enter():
                self._step()
            breaker = self._reading.breaker
            self._wake.wait(breaker.wait_seconds() if breaker.is_open else self._refresh_seconds)
            self._wake.clear()

    def _step(self) -> None:
        try:
            if self.ready.is_set():
                self.refresh()
            else:
                self._open()
        except Exception:  # noqa: BLE001 - counted and logged by `watched`; the next poll tries again
            return
        if self._rebuild_at is not None and time.monotonic() >= self._rebuild_at:
            self._rebuild_in_background(None)
        if time.monotonic() >= self._compact_at and not self._writing.breaker.is_open:
            self._compact_at = time.monotonic() + random.uniform(*_COMPACT_SECONDS)  # noqa: S311
            self._pool.run(partial(compact_quietly, self._compactor))

    def compact(self) -> None:
        """Compact index segments now; see `Compactor.run`.

        Raises:
            TierError: The bucket does not answer.
        """
        self._compactor.run()

    def _open(self) -> None:
        with self._reading.watched():
            self._claim_namespace()
            with self._polling:
                indexed = self._load(self._bucket.list(self._keys.index), again=True)
        self.ready.set()
        self._on_ready()
        self._rebuild_in_background(indexed)

    def _rebuild_in_background(self, indexed: Set[bytes] | None) -> None:
        def job() -> None:
            try:
                self.rebuild(indexed)
            except Exception:  # noqa: BLE001 - counted and logged by `watched`; tried again
                self._rebuild_at = time.monotonic() + self._rebuild_pause
                self._rebuild_pause = min(self._rebuild_pause * 2, _REBUILD_PAUSE[1])
            else:
                self._rebuild_pause = _REBUILD_PAUSE[0]

        self._rebuild_at = None
        self._pool.run(job)

    def _claim_namespace(self) -> None:
        """Make sure that the namespace document in the bucket is ours, writing it if there is none."""
        ours = self._namespace.document().encode()
        for _ in range(2):
            try:
                theirs, _size = self._bucket.get_tail(self._keys.namespace, _MAX_NAMESPACE_BYTES)
                break
            except ObjectMissing:
                if self._bucket.put(self._keys.namespace, ours):
                    return
        else:
            raise TierUnavailable(f"{self._keys.namespace} comes and goes")
        if not _same_json(ours, theirs):
            self._counters.add("namespace_mismatches")
            raise AccessDenied(
                f"{self._keys.namespace} in the bucket is damaged, or describes another model or layout than "
                "this one under the same fingerprint; remove it, or use another prefix (s3.prefix)"
            )

    def _load(self, listing: Iterable[ListedObject], again: bool = False) -> set[bytes]:
        """Read listed segments into the index, in order, and return the names of the packs in them.

        With `again` those seen before too; a corrupt one then starts no rebuild, the caller being at it.
        """
        segments = [item for item in listing if self._keys.index_time(item.key) is not None]
        with self._seen_lock:
            chosen = [item for item in segments if again or item.key not in self._seen]
        names: set[bytes] = set()
        for item, found in zip(chosen, self._map(self._load_one, chosen), strict=True):
            if isinstance(found, Tombstone):
                # Not lost, though no segment may list them: they are to be deleted.
                names.update(found.names)
                self._bury(found, self._keys.tombstone_salt(item.key) or b"")
            elif found is not None:
                self._enter(found)
                names.update(found.names())
            elif not again:
                self._rebuild_at = time.monotonic()
            with self._seen_lock:
                self._seen.add(item.key)
            self._newest = max(self._newest, self._keys.index_time(item.key) or 0)
        return names

    def _enter(self, packs: PackTable) -> None:
        self._index.add(packs)
        with self._seen_lock:
            if self._condemned:
                for name in packs.names():
                    self._condemned.pop(name, None)

    def _bury(self, tombstone: Tombstone, salt: bytes) -> None:
        with self._seen_lock:
            self._condemned.update(dict.fromkeys(tombstone.names, salt))
            for name in list(islice(self._condemned, max(0, len(self._condemned) - _MAX_CONDEMNED))):
                del self._condemned[name]
        self._index.forget_named(tombstone.names)
        self._counters.add("packs_condemned", len(tombstone.names))

    def _load_one(self, item: ListedObject) -> PackTable | Tombstone | None:
        """Read one segment or tombstone; None if it cannot be used."""
        buries = self._keys.tombstone_salt(item.key) is not None
        try:
            if not 0 < item.size <= (MAX_TOMBSTONE_BYTES if buries else MAX_SEGMENT_BYTES):
                raise CorruptBlock(f"an index segment of {item.size} bytes")
            data = bytearray(item.size)
            self._bucket.get_range(item.key, 0, memoryview(data))
            if buries:
                return read_tombstone(data, self._namespace.id)
            packs = read_segment(data, self._namespace.id, self._max_block_bytes)
        except ObjectMissing:
            # Compacted away between the listing and now.
            return PackTable.of([])
        except CorruptBlock as error:
            self._counters.add("index_segments_corrupt")
            log_once(
                _logger, "segment", "%s: %s; its packs are found again by their footers", item.key, error
            )
            return None
        self._counters.add("index_segments_loaded")
        return packs

    def _recover(self, name: bytes) -> Pack | None:
        try:
            return self._index.pack(name) or self.read_pack(name)
        except (CorruptBlock, ObjectMissing):
            return None

    def _map(self, call: Callable[[A], B], items: Sequence[A]) -> Iterator[B]:
        """Call with each item on several threads; give the results in order."""
        waiting = iter(items)
        futures = deque(self._pool.submit(partial(call, item)) for item in islice(waiting, _AHEAD))
        while futures:
            try:
                result = futures.popleft().result()
            except CancelledError:
                raise TierUnavailable("the tier is being closed") from None
            futures += [self._pool.submit(partial(call, item)) for item in islice(waiting, 1)]
            yield result


def _same_json(ours: bytes, theirs: bytes) -> bool:
    try:
        return bool(json.loads(ours) == json.loads(theirs))
    except (ValueError, RecursionError):
        return False
