"""Writing blocks: a bounded queue, a few upload threads, and index segments for what they have uploaded."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvtier._counters import Counters
from kvtier.errors import CorruptBlock, TierError
from kvtier.hashing import HASH_BYTES
from kvtier.tiers.base import StoredBlock
from kvtier.tiers.s3.bucket import BadReply, Bucket, RangeMissing
from kvtier.tiers.s3.catalog import Catalog
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack import Pack, write_pack
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.packer import Packer

_PUBLISH_SECONDS = 1.0
"""One index segment lists the packs of about this long."""
_SHORTEST_PAUSE = 0.01
_PATIENCE_SECONDS = 5.0
"""A bucket to which nothing was uploaded for so long is not waited for."""
_RETRY_SECONDS = (0.2, 10.0)
_MAX_ODD_FAILURES = 5
_SALT_BYTES = 8
_MAX_POSITION = (1 << 32) - 1


@dataclass(eq=False, slots=True)
class PackJob:
    """Blocks that are to become one pack.

    Attributes:
        blocks: In the chain's order; their payloads are bytes that nobody changes.
        size: Bytes of all payloads.
        salt: Makes another name when the plain one is taken by an object that cannot be used.
        failures: Failed attempts so far.
        not_before: When to try next, monotonic seconds.
        running: Whether a thread is at it.
    """

    blocks: list[StoredBlock]
    size: int
    salt: bytes = b""
    failures: int = 0
    not_before: float = 0.0
    running: bool = False


class Uploader:
    """Takes blocks, gathers them into packs, uploads these and publishes them in index segments.

    What waits is bounded in bytes. While the bucket does not answer, the oldest packs make room for new
    blocks; while it is merely slow, who writes waits for room, and blocks are refused when none comes.
    Uploads begin once `start` says that the index is loaded, so that nothing is uploaded that the bucket
    already has.
    """

    def __init__(
        self,
        bucket: Bucket,
        keys: Keys,
        namespace: bytes,
        index: BlockIndex,
        catalog: Catalog,
        health: Health,
        counters: Counters,
        *,
        window_blocks: int,
        max_block_bytes: int,
        pending_limit: int,
        pack_delay: float,
        threads: int,
    ):
        """Make an uploader; its threads wait for `start`.

        Args:
            bucket: Where to write.
            keys: Names of the objects.
            namespace: The namespace's id.
            index: Knows which blocks need no upload, and learns of those uploaded.
            catalog: Publishes what was uploaded.
            health: Of the writing direction.
            counters: Gets what happened.
            window_blocks: Blocks of a whole pack.
            max_block_bytes: Larger payloads are refused.
            pending_limit: Bytes of payloads that may wait.
            pack_delay: Seconds after the last block until an incomplete pack is uploaded.
            threads: Uploads under way at once.
        """
        self._bucket = bucket
        self._keys = keys
        self._namespace = namespace
        self._index = index
        self._catalog = catalog
        self._health = health
        self._counters = counters
        self._max_block_bytes = max_block_bytes
        self._pending_limit = pending_limit
        self._pack_delay = pack_delay
        # Everything below is guarded by this condition; it is notified when there may be something to do.
        self._changed = threading.Condition()
        self._started = False
        self._closed = False
        self._pending_bytes = 0
        self._progress = 0.0
        self._pending: set[bytes] = set()
        self._packer = Packer(window_blocks, lambda block: block in self._pending or block in self._index)
        self._jobs: dict[PackJob, None] = {}
        self._unpublished: list[Pack] = []
        self._publish_at = 0.0
        self._publishing = False
        self._flushes = 0
        self._uploaded = self._published = self._lost = 0
        self._threads = [
            threading.Thread(target=self._run, name="kvtier-s3-write", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending_bytes(self) -> int:
        """Bytes of the payloads that wait or are being uploaded."""
        return self._pending_bytes

    def start(self) -> None:
        """Begin to upload."""
        with self._changed:
            self._started = True
            self._changed.notify_all()

    def write(self, blocks: Sequence[StoredBlock]) -> int:
        """Take blocks over, waiting for a bucket that is slow; see `Tier.write`.

        A prompt is encoded faster than most buckets take it. Without the blocks that are refused in the
        middle, those behind them are worth nothing.
        """
        taken = 0
        with self._changed:
            for block in blocks:
                if self._knows(block):
                    taken += 1
                elif self._is_sound(block) and self._make_room(len(block.payload)):
                    # Others may have brought it while this waited for room.
                    if not self._knows(block):
                        self._take(block)
                    taken += 1
            self._changed.notify_all()
        if taken < len(blocks):
            self._counters.add("blocks_refused", len(blocks) - taken)
        return taken

    def flush(self, timeout: float) -> bool:
        """Upload and publish all that was taken over; False if some is not there after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            lost = self._lost
            self._seal(self._packer.take_due(time.monotonic(), 0.0))
            waited_for = set(self._jobs)
            self._flushes += 1
            self._changed.notify_all()
            try:
                done = self._wait(lambda: waited_for.isdisjoint(self._jobs), deadline)
                uploaded = self._uploaded
                done = done and self._wait(lambda: self._published >= uploaded, deadline)
            finally:
                self._flushes -= 1
            return done and self._lost == lost

    def close(self, timeout: float) -> None:
        """Flush, then end the threads. What could not be uploaded in time is dropped and counted."""
        deadline = time.monotonic() + timeout
        self.flush(timeout)
        with self._changed:
            self._closed = True
            for job in [job for job in self._jobs if not job.running]:
                self._drop(job)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _knows(self, block: StoredBlock) -> bool:
        return block.hash in self._pending or block.hash in self._index

    def _is_sound(self, block: StoredBlock) -> bool:
        return (
            not self._closed
            and len(block.hash) == len(block.parent) == HASH_BYTES
            and 0 <= block.position < _MAX_POSITION
            and 1 <= len(block.payload) <= self._max_block_bytes
        )

    def _make_room(self, size: int) -> bool:
        while self._pending_bytes + size > self._pending_limit:
            if self._health.breaker.is_open or not self._started:
                oldest = next((job for job in self._jobs if not job.running), None)
                if oldest is None:
                    return False
                self._drop(oldest)
                continue
            left = self._progress + _PATIENCE_SECONDS - time.monotonic()
            if self._closed or left <= 0:
                return False
            # Who uploads has to hear of what was taken so far.
            self._changed.notify_all()
            self._changed.wait(left)
        # Whoever closes makes room, too, and nobody is there any more to upload what is taken.
        return not self._closed

    def _take(self, block: StoredBlock) -> None:
        # The caller's buffer may be reused once `write` returns.
        payload = block.payload if isinstance(block.payload, bytes) else bytes(block.payload)
        if not self._pending_bytes:
            self._progress = time.monotonic()
        self._pending.add(block.hash)
        self._pending_bytes += len(payload)
        complete = self._packer.add(replace(block, payload=payload), time.monotonic())
        if complete is not None:
            self._seal([complete])

    def _seal(self, packs: Sequence[list[StoredBlock]]) -> None:
        for blocks in packs:
            self._jobs[PackJob(blocks, sum(len(block.payload) for block in blocks))] = None

    def _run(self) -> None:
        while (task := self._next_task()) is not None:
            task()

    def _next_task(self) -> Callable[[], None] | None:
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                self._seal(self._packer.take_due(now, self._pack_delay))
                task = self._due_task(now) if self._started else None
                if task is not None:
                    return task
                self._changed.wait(self._pause(now))
        return None

    def _due_task(self, now: float) -> Callable[[], None] | None:
        # Publishing comes first: other nodes must hear of packs however many more are waiting.
        due = now >= self._publish_at or (self._flushes and not self._jobs)
        if self._unpublished and not self._publishing and due and self._health.breaker.try_enter():
            self._publishing = True
            return self._publish
        job = next((job for job in self._jobs if not job.running and job.not_before <= now), None)
        if job is not None and self._health.breaker.try_enter():
            job.running = True
            return partial(self._upload, job)
        return None

    def _pause(self, now: float) -> float | None:
        """Return the seconds until there may be something to do without further notice; None if never."""
        times = [job.not_before for job in self._jobs if not job.running]
        if self._unpublished and not self._publishing:
            times.append(self._publish_at)
        wait = max(min(times) - now, self._health.breaker.wait_seconds()) if times else None
        due = self._packer.next_due(self._pack_delay)
        if due is not None:
            wait = due - now if wait is None else min(wait, due - now)
        return None if wait is None else max(wait, _SHORTEST_PAUSE)

    def _upload(self, job: PackJob) -> None:
        pack: Pack | None = None
        is_new = False
        try:
            if not all(block.hash in self._index for block in job.blocks):
                with self._health.watched():
                    pack, is_new = self._store(job)
        except Exception as error:  # noqa: BLE001 - counted and logged by `watched`
            self._retry(job, error)
            return
        with self._changed:
            if pack is not None:
                # The index may know what is new, from its footer, before any segment lists it.
                if is_new or self._index.pack(pack.name) is None:
                    self._announce(pack)
                self._index.add([pack])
            if job.salt or all(block.hash in self._index for block in job.blocks):
                self._finish(job)
            else:
                # The object of that name is of no use, or its place is quarantined.
                job.salt = os.urandom(_SALT_BYTES)
                job.running = False
            self._changed.notify_all()

    def _store(self, job: PackJob) -> tuple[Pack, bool]:
        """Bring one pack into the bucket, and say what is there and whether it is new."""
        job.salt = job.salt or self._catalog.salt_for([block.hash for block in job.blocks])
        body, pack = write_pack(job.blocks, self._namespace, job.salt)
        if self._bucket.put(self._keys.pack(pack.name), body):
            self._counters.add("packs_uploaded")
            return pack, True
        # Another replica's bytes may be laid out differently: its footer holds, not what we have here.
        self._counters.add("packs_found")
        return self._catalog.read_pack(pack.name), False

    def _retry(self, job: PackJob, error: Exception) -> None:
        usual = isinstance(error, TierError)
        with self._changed:
            job.failures += 1
            job.running = False
            # Also an object without any bytes: some servers keep what there was of a PUT that broke off.
            if isinstance(error, CorruptBlock | RangeMissing) and not isinstance(error, BadReply):
                job.salt = os.urandom(_SALT_BYTES)
            if self._closed or (not usual and job.failures >= _MAX_ODD_FAILURES):
                self._drop(job)
            job.not_before = time.monotonic() + _backoff(job.failures)
            self._changed.notify_all()

    def _announce(self, pack: Pack) -> None:
        if not self._unpublished:
            self._publish_at = time.monotonic() + _PUBLISH_SECONDS
        self._unpublished.append(pack)
        self._uploaded += 1

    def _publish(self) -> None:
        packs = list(self._unpublished)
        try:
            with self._health.watched():
                self._catalog.publish(PackTable.of(packs))
        except Exception:  # noqa: BLE001 - counted and logged by `watched`; tried again
            packs = []
        with self._changed:
            del self._unpublished[: len(packs)]
            self._published += len(packs)
            self._publish_at = time.monotonic() + _PUBLISH_SECONDS
            self._publishing = False
            self._changed.notify_all()

    def _drop(self, job: PackJob) -> None:
        self._lost += len(job.blocks)
        self._counters.add("blocks_dropped", len(job.blocks))
        self._finish(job)

    def _finish(self, job: PackJob) -> None:
        del self._jobs[job]
        self._pending_bytes -= job.size
        self._progress = time.monotonic()
        self._pending.difference_update(block.hash for block in job.blocks)

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        return self._changed.wait_for(condition, max(0.0, deadline - time.monotonic()))


def _backoff(failures: int) -> float:
    first, longest = _RETRY_SECONDS
    return float(min(first * 2**failures, longest)) * random.uniform(0.5, 1.0)  # noqa: S311 - not for secrets
