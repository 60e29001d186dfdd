"""One shard of the disk tier: a diskcache `Cache` that is opened, repaired and swept on its own."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from diskcache import DEFAULT_SETTINGS, EVICTION_POLICY, Cache, Timeout

from kvtier.codec import StoredFile
from kvtier.errors import CorruptBlock, TierUnavailable
from kvtier.tiers.disk_files import FILE_NAME, BlockFile, BlockFiles
from kvtier.tiers.disk_health import Health
from kvtier.tiers.disk_rows import ShardRows

SET_ASIDE = ".damaged-"
"""Stands between the name of a shard that was set aside, to be deleted, and a random part."""

_BUSY_SECONDS = 0.5

# diskcache's own least-recently-used policy writes to the database on every read, which makes reads from the
# page cache 2.6 times as long for 1 MiB and 1.5 times for 4 MiB. Here reads only note what was used, and
# `maintain` writes the access times in one transaction.
_POLICY = "kvtier-least-recently-used"
EVICTION_POLICY[_POLICY] = {**EVICTION_POLICY["least-recently-used"], "get": None}

_SETTINGS = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": _POLICY,
    # Evicting is up to `write`: diskcache evicts a fixed number of rows whatever their size.
    "cull_limit": 0,
    # Free pages are used again, for the number of blocks hardly changes.
    "sqlite_auto_vacuum": 0,
    "sqlite_cache_size": 1024,
    # Neither a write-ahead log, whose index is mapped memory, nor a mapped database: should somebody truncate
    # such a file, the next access is a SIGBUS, and the process is gone.
    "sqlite_journal_mode": "truncate",
    "sqlite_mmap_size": 0,
    # Safe when the process is killed. After a power failure the database may be damaged: an empty cache.
    "sqlite_synchronous": 0,
    "disk_min_file_size": 0,
    "disk_pickle_protocol": 0,
}


class DiskShard:
    """A directory with one SQLite database and the files that it names.

    `maintain` opens it, and until then it holds nothing. A shard whose database is damaged is set aside and
    begun anew, empty. No method raises.

    Attributes:
        held: The blocks believed to be here, and which file each has (`BlockFile.tag`, 0 where only its row
            knows); read by anybody, changed by the shard alone.
        size_bytes: Files and database together, when last looked at.
    """

    def __init__(
        self, directory: Path, namespace: bytes, max_payload_bytes: int, limit_bytes: int, health: Health
    ) -> None:
        self.held: dict[bytes, int] = {}
        self.size_bytes = 0
        self._directory = directory
        self._namespace = namespace
        self._max_payload_bytes = max_payload_bytes
        self._limit_bytes = limit_bytes
        self._health = health
        self._rows = ShardRows(directory, namespace, max_payload_bytes, _BUSY_SECONDS)
        # Guards which cache is the current one; never held while blocks are read or written.
        self._lock = threading.Lock()
        # Held for each use of the database: SQLite lets threads that meet there sleep for milliseconds.
        self._turn = threading.Lock()
        self._cache: Cache | None = None
        self._identity: tuple[int, int] | None = None
        self._closed = False
        self._swept = False
        self._used_lock = threading.Lock()
        self._used: dict[bytes, float] = {}

    @property
    def is_open(self) -> bool:
        """Whether the shard can serve."""
        return self._cache is not None

    def open(self, block_hash: bytes, used_at: float) -> StoredFile | None:
        """Open a block's file for the caller to close, or return None and forget the block if it is gone.

        Args:
            block_hash: The block.
            used_at: When it is used, in seconds since the epoch.
        """
        cache, tag = self._cache, self.held.get(block_hash)
        if cache is None or tag is None:
            return None
        opened: StoredFile | None = None
        try:
            if tag:
                with contextlib.suppress(FileNotFoundError):
                    opened = cache.disk.open(BlockFile.of(block_hash, tag))
            if opened is None:
                # Another process may have replaced it.
                with self._take_turn():
                    file = cache.get(self._namespace + block_hash)
                if file is not None:
                    opened = cache.disk.open(file)
        except FileNotFoundError:
            opened = None
        except Exception as error:  # noqa: BLE001 - whatever a damaged shard does is a miss
            cause = self._health.failed(error)
            if isinstance(error, CorruptBlock):
                self._delete(cache, block_hash)
            elif isinstance(error, TierUnavailable):
                self.held.pop(block_hash, None)
            else:
                self._recover(cache, cause)
            return None
        if opened is None:
            self._delete(cache, block_hash)
            return None
        with self._used_lock:
            self._used[block_hash] = used_at
        return opened

    def write(self, block_hash: bytes, payload: memoryview) -> bool:
        """Keep a block unless it is held already, and evict what has become too much.

        Returns:
            Whether the block is held.
        """
        if block_hash in self.held:
            return True
        cache = self._cache
        if cache is None or self._health.paused:
            return False
        key = self._namespace + block_hash
        name = cache.disk.name(block_hash)
        try:
            # Another process may have written it, or this one before it forgot.
            with self._take_turn():
                present = key in cache
            tag = 0
            if not present:
                file = cache.disk.write(name, payload)
                with self._take_turn():
                    cache.set(key, file)
                tag = file.tag
                self._health.count("writes")
        except Exception as error:  # noqa: BLE001 - whatever a damaged shard does is a block not kept
            cache.disk.remove(name)
            cause = self._health.failed(error)
            self._health.wrote(cause)
            self._recover(cache, cause)
            return False
        self._health.wrote(None)
        self.held[block_hash] = tag
        self._shrink(cache)
        return True

    def discard(self, block_hash: bytes) -> None:
        """Forget a block and remove its file."""
        cache = self._cache
        if cache is None:
            return
        self._delete(cache, block_hash)

    def maintain(self, sweep_up_to_ns: int) -> None:
        """Open the shard if it is not open; else do what is not urgent: sweep once, write access times.

        Args:
            sweep_up_to_ns: Files without a row are removed if last written up to then, ns since the epoch.
        """
        cache = self._cache
        if cache is None or self._moved() or self._rows.has_log():
            self._renew(cache)
            return
        try:
            if not self._swept:
                self._sweep(sweep_up_to_ns)
                self._swept = True
            self._write_access_times()
            self._rows.note_new(self.held)
            self.size_bytes = cache.volume()
        except Exception as error:  # noqa: BLE001 - whatever a damaged shard does, the others go on
            self._recover(cache, self._health.failed(error))

    def disconnect(self) -> None:
        """Close the calling thread's connection to the database; it is opened again when it is needed."""
        cache = self._cache
        if cache is not None:
            with contextlib.suppress(sqlite3.Error):
                cache.close()

    def close(self) -> None:
        """Write what is noted and let go of the database; from then on nothing is held."""
        self.disconnect()
        with self._lock:
            cache, self._cache, self._closed = self._cache, None, True
            self.held = {}
        if cache is None:
            return
        try:
            self._write_access_times()
        except Exception as error:  # noqa: BLE001 - that loses at most the order of eviction
            self._health.failed(error)

    @contextlib.contextmanager
    def _take_turn(self) -> Iterator[None]:
        turn = self._turn
        if not turn.acquire(timeout=_BUSY_SECONDS):
            raise Timeout
        try:
            yield
        finally:
            turn.release()

    def _shrink(self, cache: Cache) -> None:
        try:
            with self._take_turn():
                self.size_bytes = cache.volume()
                if self.size_bytes > self._limit_bytes:
                    self._health.count("evictions", cache.cull())
                    self.size_bytes = cache.volume()
        except Exception as error:  # noqa: BLE001 - whatever a damaged shard does is a miss
            self._recover(cache, self._health.failed(error))

    def _delete(self, cache: Cache, block_hash: bytes) -> None:
        self.held.pop(block_hash, None)
        try:
            with self._take_turn():
                cache.delete(self._namespace + block_hash)
        except Exception as error:  # noqa: BLE001 - whatever a damaged shard does is a miss
            self._recover(cache, self._health.failed(error))

    def _recover(self, cache: Cache, cause: str) -> None:
        """Make the shard usable again after an error, if it can be."""
        # A failed commit may leave this thread's connection inside its transaction for ever.
        with contextlib.suppress(sqlite3.Error):
            cache.close()
        if cause == "corrupt" or self._moved():
            self._renew(cache, damaged=cause == "corrupt")

    def _renew(self, old: Cache | None, damaged: bool = False) -> None:
        """Open the database again, empty if it is damaged; nothing if another thread has replaced `old`."""
        with self._lock:
            if self._cache is not old or self._closed:
                return
            self._cache = None
            self.held = {}
            self.size_bytes = 0
            try:
                # Without their database the files are of no use, and nobody would count them. A database
                # that is not ours any more was replaced by another process.
                found = self._rows.identity()
                if (damaged and found == self._identity) or (old is not None and found is None):
                    self._set_aside()
                try:
                    self._open()
                except Exception as error:
                    if self._health.failed(error) != "corrupt":
                        raise
                    self._set_aside()
                    self._open()
            except Exception as error:  # noqa: BLE001 - not to be opened now: everything is a miss, and tried later
                self._health.wrote(self._health.failed(error))

    def _open(self) -> None:
        self._rows.check({*DEFAULT_SETTINGS, *_SETTINGS})
        cache = Cache(
            str(self._directory),
            timeout=_BUSY_SECONDS,
            disk=BlockFiles,
            size_limit=self._limit_bytes,
            disk_max_payload_bytes=self._max_payload_bytes,
            **_SETTINGS,
        )
        held: dict[bytes, int] = {}
        cache.disk.on_remove = lambda block_hash: held.pop(block_hash, None)
        self._rows.note_all(held)
        self.size_bytes = cache.volume()
        self.held = held
        self._identity = self._rows.identity()
        self._turn = threading.Lock()
        self._cache = cache

    def _set_aside(self) -> None:
        self._health.count("shards_reset")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._directory, f"{self._directory}{SET_ASIDE}{os.urandom(6).hex()}")

    def _moved(self) -> bool:
        """Whether the database is not the file any more that was opened."""
        return self._rows.identity() != self._identity

    def _write_access_times(self) -> None:
        with self._used_lock:
            used, self._used = self._used, {}
        self._rows.write_access_times(used)

    def _sweep(self, up_to_ns: int) -> None:
        """Remove files without a row, as a crash between file and row leaves them, and add up the size."""
        # Rows are looked up after the files, so that a block committed meanwhile has its row among them.
        orphans = set(self._files())
        self._rows.strike_listed(orphans)
        for name in orphans:
            path = self._directory / name
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_mtime_ns <= up_to_ns:
                    os.unlink(path)
                    self._health.count("orphans_removed")

    def _files(self) -> Iterator[str]:
        for folder in os.scandir(self._directory):
            if len(folder.name) == 1 and folder.is_dir(follow_symlinks=False):
                for file in os.scandir(folder.path):
                    name = f"{folder.name}/{file.name}"
                    if FILE_NAME.fullmatch(name):
                        yield name
