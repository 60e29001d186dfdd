"""What is done with a shard's database that diskcache has no call for, on connections of its own."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

from diskcache.core import MODE_BINARY

from kvtier.errors import CorruptBlock
from kvtier.hashing import HASH_BYTES
from kvtier.tiers.disk_files import KEY_BYTES, BlockFile

_DATABASE = "cache.db"
_OTHER_SETTINGS = {"disk_max_payload_bytes", "count", "size", "hits", "misses"}


class ShardRows:
    """The rows of one namespace's blocks in a shard's database, of which nothing is trusted.

    What goes wrong is raised as SQLite says it.
    """

    def __init__(
        self, directory: Path, namespace: bytes, max_payload_bytes: int, busy_seconds: float
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            directory: The shard.
            namespace: Whose blocks are looked for.
            max_payload_bytes: Longer ones are not believed in.
            busy_seconds: How long to wait for a database that somebody else uses.
        """
        self._directory = directory
        self._namespace = namespace
        self._max_payload_bytes = max_payload_bytes
        self._busy_seconds = busy_seconds
        self._last_row = 0

    def check(self, settings: Set[str]) -> None:
        """Refuse a shard that must not be given to diskcache, if there is one.

        diskcache sets an attribute for every setting that it finds in the database, whatever its name.

        Args:
            settings: Names of those that may be there.

        Raises:
            CorruptBlock: There are others, or what lies in the shard's place is none.
        """
        database_path = self._directory / _DATABASE
        try:
            if not stat.S_ISREG(os.lstat(database_path).st_mode):
                raise CorruptBlock("the database of a shard is not a file")
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise CorruptBlock("a shard is not a directory") from None
        if self.has_log():
            raise CorruptBlock("the database of a shard has a write-ahead log")
        with self._connect() as database:
            tables = {
                name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            }
            names = set(database.execute("SELECT key FROM Settings")) if "Settings" in tables else set()
        foreign = {name for (name,) in names} - settings - _OTHER_SETTINGS
        if foreign:
            raise CorruptBlock(f"the database of a shard has {len(foreign)} foreign settings")

    def identity(self) -> tuple[int, int] | None:
        """Return what tells the database's file from any other; None if there is none."""
        try:
            found = os.stat(self._directory / _DATABASE)
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def has_log(self) -> bool:
        """Say whether there is a write-ahead log, which SQLite would take for the database's own."""
        return os.path.lexists(self._directory / f"{_DATABASE}-wal")

    def note_all(self, held: dict[bytes, int]) -> None:
        """Add all blocks, and for each which file it has (`BlockFile.tag`, 0 where only its row knows)."""
        self._last_row = 0
        self.note_new(held)

    def note_new(self, held: dict[bytes, int]) -> None:
        """Add the blocks of rows that were not looked at yet: other processes write here too."""
        with self._connect() as database:
            (last,) = database.execute("SELECT COALESCE(MAX(rowid), 0) FROM Cache").fetchone()
            # The conditions on the other columns keep absurd rows from ever being fetched. They need the rows
            # themselves, and reading those in their order is 2.5 times as fast as by way of the index.
            rows = database.execute(
                "SELECT key, mode, filename, value FROM Cache NOT INDEXED"
                " WHERE rowid > ? AND rowid <= ? AND key >= ? AND key < ? AND length(key) = ? AND raw = 1"
                " AND typeof(mode) = 'integer' AND typeof(value) = 'integer' AND length(filename) < 64",
                (
                    self._last_row,
                    last,
                    self._namespace,
                    self._namespace + b"\xff" * (HASH_BYTES + 1),
                    KEY_BYTES,
                ),
            )
            for key, mode, name, length in rows:
                known = mode == MODE_BINARY and isinstance(name, str) and length <= self._max_payload_bytes
                held[key[HASH_BYTES:]] = BlockFile(name, length).tag if known else 0
        self._last_row = last

    def write_access_times(self, used: Mapping[bytes, float]) -> None:
        """Write when blocks were used, in seconds since the epoch."""
        if not used:
            return
        rows = [(used_at, self._namespace + block_hash) for block_hash, used_at in used.items()]
        with self._connect() as database:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("UPDATE Cache SET access_time = ? WHERE key = ? AND raw = 1", rows)
            database.execute("COMMIT")

    def strike_listed(self, files: set[str]) -> None:
        """Take the files that rows name out of `files`, and have the database add up the size of its own."""
        with self._connect() as database:
            files.difference_update(name for (name,) in database.execute("SELECT filename FROM Cache"))
            database.execute(
                "UPDATE Settings SET value = (SELECT COALESCE(SUM(size), 0) FROM Cache) WHERE key = 'size'"
            )

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(
            self._directory / _DATABASE,
            timeout=self._busy_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            database.execute("PRAGMA mmap_size = 0")
            database.execute("PRAGMA synchronous = OFF")
            yield database
        finally:
            database.close()
