"""The disk tier: encoded blocks in files on the local disk, indexed by diskcache."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.codec import StoredFile
from kvtier.errors import ConfigError, CorruptBlock
from kvtier.hashing import Namespace
from kvtier.tiers.base import Deliver, DeliverFile, StoredBlock
from kvtier.tiers.disk_health import Health
from kvtier.tiers.disk_shard import SET_ASIDE, DiskShard

_logger = logging.getLogger(__name__)
_Job = TypeVar("_Job")

_MAX_SHARDS = 8
_THREADS = 4
# Who reads a block also decodes it, which takes most of the time: more threads than that gain nothing.
_READERS = max(_THREADS, min(12, (os.cpu_count() or 1) * 3 // 4))
_BLOCKS_PER_SHARD = 64
_MIN_BLOCKS = 16
_OPEN_SECONDS = 10.0
_TICK_SECONDS = 0.01
_MIN_BYTES = 1 << 17
# While another process has the directory open, a file without a row may be one that it is writing.
_YOUNG_SECONDS = 600


class DiskTier:
    """Blocks on the local disk, size-bounded, evicted least recently used first.

    The blocks lie in up to eight diskcache `Cache` shards, as diskcache's `FanoutCache` lays them out. The
    shards are opened one by one, without `FanoutCache`, because it can neither open nor replace a single
    shard, and its `get` hides what went wrong.

    One directory serves all namespaces: a key is namespace and hash, so blocks of an older model are never
    found, share the size bound, and age out like any others. What is held of this tier's own namespace is
    also known in memory, loaded at the start, so `match` does no I/O. Several processes may have the
    directory open; blocks that another one writes are found within `retry_seconds`.

    Crash-safe: after SIGKILL at any moment each block is there whole or not at all, and files that no row
    names are removed at the next start. Nothing is synced to the medium: after a power failure blocks may be
    missing, and short or damaged ones are for the reader to refuse.
    """

    name = "disk"

    def __init__(
        self,
        path: Path,
        size_bytes: int,
        namespace: Namespace,
        max_payload_bytes: int,
        *,
        retry_seconds: float = 5.0,
    ) -> None:
        """Open the directory, or make it; one that cannot be used is a tier of misses that tries again.

        A disk that takes longer than ten seconds to open is opened in the background.

        Args:
            path: The directory; nothing else may live in it. One that is made here is closed to other users.
            size_bytes: Bound on files and databases together, all namespaces. Files that are just being
                evicted do not count.
            namespace: Whose blocks to find.
            max_payload_bytes: No larger payload is written or read.
            retry_seconds: How long a failure to write or to open keeps the next attempt off, and how often
                access times are written and other processes' blocks looked for.

        Raises:
            ConfigError: `size_bytes` is too small for payloads of `max_payload_bytes`.
        """
        needed = _MIN_BLOCKS * max_payload_bytes + _MIN_BYTES
        if size_bytes < needed:
            raise ConfigError(
                f"a disk tier of {size_bytes} bytes is too small for blocks of up to {max_payload_bytes}"
                f" bytes: it needs at least {needed}"
            )
        # diskcache expands variables in its directory, so the two must agree on the result.
        self._root = Path(os.path.abspath(os.path.expandvars(os.path.expanduser(path))))
        self._max_payload_bytes = max_payload_bytes
        self._size_bytes = size_bytes
        self._health = Health(retry_seconds)
        self._closed = False

        self._lock_file, self._sweep_up_to_ns = self._enter()
        # A file is written before its row makes room for it: that many may be on their way.
        bound = size_bytes - _THREADS * max_payload_bytes
        count = self._count_shards(bound // (_BLOCKS_PER_SHARD * max_payload_bytes))
        self._writing = threading.BoundedSemaphore(_THREADS)
        # Made highest first: whoever sees any shard of a directory in the making sees how many there will be.
        shards = [
            DiskShard(
                self._root / f"{index:03d}", namespace.id, max_payload_bytes, bound // count, self._health
            )
            for index in reversed(range(count))
        ]
        self._shards = shards[::-1]
        # A connection to a shard belongs to the thread that made it: nobody else can close it.
        self._readers = Workers("disk-read", _READERS - 1, at_end=self._disconnect)
        self._writers = Workers("disk-write", _THREADS - 1, at_end=self._disconnect)
        self._opened = threading.Event()
        self._stop = threading.Event()
        self._maintenance = threading.Thread(target=self._maintain, name="kvtier-disk", daemon=True)
        self._maintenance.start()
        self._opened.wait(_OPEN_SECONDS)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return the length of the longest leading run of blocks believed to be held."""
        shards = self._shards
        for index, block_hash in enumerate(hashes):
            if block_hash not in shards[block_hash[-1] % len(shards)].held:
                return index
        return len(hashes)

    def read(self, hashes: Sequence[bytes], deliver: Deliver) -> None:
        """Read blocks in order with several threads, and hand each to `deliver` from the thread that read it.

        A hash that is named twice is delivered twice.
        """

        def deliver_bytes(block_hash: bytes, file: StoredFile | None) -> None:
            payload: bytes | None = None
            try:
                payload = file.read() if file is not None else None
            except CorruptBlock as error:
                self._health.failed(error)
                self.discard([block_hash])
            except MemoryError as error:
                self._health.failed(error)
            deliver(block_hash, payload)

        self.read_files(hashes, deliver_bytes)

    def read_files(self, hashes: Sequence[bytes], deliver: DeliverFile) -> None:
        """Do as `read` does, but hand out each block's open file, which is closed after `deliver`."""
        now = time.time()

        def open_one(job: tuple[int, bytes]) -> None:
            index, block_hash = job
            # Later blocks of a chain count as used earlier: its tail is evicted before its head.
            file = self._shard(block_hash).open(block_hash, now - index * 1e-6)
            self._health.count("misses" if file is None else "hits")
            try:
                deliver(block_hash, file)
            except Exception as error:  # noqa: BLE001 - one receiver's defect must not cost the others their blocks
                log_once(_logger, "deliver", "a receiver of blocks raised %r", error)
            finally:
                if file is not None:
                    os.close(file.descriptor)

        _share(self._readers, _READERS, list(enumerate(hashes)), open_one)

    def write(self, blocks: Sequence[StoredBlock]) -> int:
        """Write blocks that are not held yet; larger ones than `max_payload_bytes` are refused."""
        held: list[bytes] = []

        def write_one(block: StoredBlock) -> None:
            payload = memoryview(block.payload).cast("B")
            if payload.nbytes > self._max_payload_bytes:
                self._health.count("oversized")
                return
            with self._writing:
                if self._shard(block.hash).write(block.hash, payload):
                    held.append(block.hash)

        _share(self._writers, _THREADS, blocks, write_one)
        return len(held)

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Forget blocks and remove their files."""
        for block_hash in hashes:
            self._shard(block_hash).discard(block_hash)

    def flush(self, timeout: float) -> bool:
        """Do nothing: what `write` has returned from survives a crash of this process."""
        return True

    def stats(self) -> Mapping[str, int | float]:
        """Return counters, and gauges as of the last write or maintenance.

        `errors_<cause>`: busy (another process held a shard too long), full, read_only, corrupt, io (any
        other). `shards_reset` counts shards whose database was damaged and begun anew. `writable` is 0 from
        a failed write to the next successful one, and while a shard cannot be opened.
        """
        opened = sum(shard.is_open for shard in self._shards)
        return {
            **self._health.counts(),
            "blocks": sum(len(shard.held) for shard in self._shards),
            "size_bytes": sum(shard.size_bytes for shard in self._shards),
            "capacity_bytes": self._size_bytes,
            "shards": len(self._shards),
            "shards_open": opened,
            "writable": int(self._health.writable and opened == len(self._shards)),
        }

    def close(self, timeout: float = 10.0) -> None:
        """Let go of the directory, waiting at most `timeout` seconds; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + timeout
        self._stop.set()
        self._maintenance.join(timeout)
        for pool in (self._readers, self._writers):
            pool.close(max(0.0, deadline - time.monotonic()))
        for shard in self._shards:
            shard.close()
        if self._lock_file is not None:
            os.close(self._lock_file)

    def _disconnect(self) -> None:
        for shard in self._shards:
            shard.disconnect()

    def _shard(self, block_hash: bytes) -> DiskShard:
        # The first digit picks the folder inside the shard, so the last byte picks the shard.
        return self._shards[block_hash[-1] % len(self._shards)]

    def _enter(self) -> tuple[int | None, int]:
        """Make the directory, and say to others that it is in use.

        Returns:
            The lock's descriptor, None if the directory cannot be written, and the time, ns since the epoch
            by the file system's clock, up to which a file without a row is an orphan.
        """
        descriptor: int | None = None
        try:
            # Prompts can be guessed from their KV: other users have no business there.
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(
                self._root / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644
            )
            alone = _try_lock(descriptor, fcntl.LOCK_EX)
            _try_lock(descriptor, fcntl.LOCK_SH)
            os.utime(descriptor)
            opened_ns = os.fstat(descriptor).st_mtime_ns
            # What this tier writes must be younger than what a killed process left in the same tick.
            time.sleep(_TICK_SECONDS)
        except OSError as error:
            self._health.wrote(self._health.failed(error))
            return descriptor, 0
        return descriptor, opened_ns if alone else opened_ns - _YOUNG_SECONDS * 10**9

    def _count_shards(self, wanted: int) -> int:
        """Return how many shards the directory has; if none, as many as `wanted`, within bounds."""
        present = [index for index in range(_MAX_SHARDS) if os.path.exists(self._root / f"{index:03d}")]
        return max(present) + 1 if present else max(1, min(_MAX_SHARDS, wanted))

    def _maintain(self) -> None:
        # Highest first: whoever sees any shard of a directory in the making sees how many there will be.
        for shard in reversed(self._shards):
            shard.maintain(self._sweep_up_to_ns)
        self._opened.set()
        while not self._stop.is_set():
            for shard in self._shards:
                shard.maintain(self._sweep_up_to_ns)
            with contextlib.suppress(OSError):
                for damaged in self._root.glob(f"*{SET_ASIDE}*"):
                    shutil.rmtree(damaged, ignore_errors=True)
            self._stop.wait(self._health.retry_seconds)
        self._disconnect()


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _share(pool: Workers, threads: int, jobs: Sequence[_Job], work: Callable[[_Job], None]) -> None:
    """Do `work` on every job, begun in order, in this thread and those of the pool that are free."""
    queue: SimpleQueue[_Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)

    def drain() -> None:
        while True:
            try:
                job = queue.get_nowait()
            except Empty:
                return
            work(job)

    # A closed pool takes no more jobs: this thread finishes alone.
    helpers: list[Future[None]] = [pool.submit(drain) for _ in range(min(len(jobs), threads) - 1)]
    drain()
    for helper in helpers:
        if not helper.cancel():
            helper.result()
