"""What lies in the disk tier's directory is hostile: it can make blocks missing, and nothing else."""

from __future__ import annotations

import os
import pickle
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from diskcache import Timeout
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import CorruptBlock, TierUnavailable
from kvtier.hashing import Namespace
from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.disk_files import BlockFiles
from kvtier.tiers.disk_health import cause_of

MODEL = Namespace.from_facts({"model": "a"})
MAX_PAYLOAD_BYTES = 8192
BLOCKS = [
    StoredBlock(bytes([number] * 16), bytes(16), number, bytes([number]) * 5000) for number in range(1, 9)
]
HASHES = [block.hash for block in BLOCKS]


class Explosive:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def open_tier(path: Path) -> DiskTier:
    return DiskTier(path, 800 << 10, MODEL, MAX_PAYLOAD_BYTES)


def read(tier: DiskTier) -> int:
    """Return how many of `BLOCKS` can be read; all that can be are exact."""
    delivered: dict[bytes, bytes | None] = {}
    tier.read(HASHES, lambda name, payload: delivered.__setitem__(name, payload and bytes(payload)))
    assert len(delivered) == len(BLOCKS)
    assert all(delivered[block.hash] in (None, block.payload) for block in BLOCKS)
    return sum(payload is not None for payload in delivered.values())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory whose one shard holds `BLOCKS`."""
    with closing(open_tier(tmp_path / "tier")) as tier:
        assert tier.write(BLOCKS) == len(BLOCKS)
    return tmp_path / "tier"


@pytest.fixture
def database(place: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(place / "000" / "cache.db", isolation_level=None)) as connection:
        yield connection


class TestRows:
    def test_nothing_is_pickled(self, place: Path, database: sqlite3.Connection) -> None:
        rows = database.execute("SELECT typeof(key), raw, mode, typeof(value), value FROM Cache").fetchall()
        assert rows == [("blob", 1, 2, "integer", 5000)] * len(BLOCKS)
        for path in place.glob("0*/*/*.val"):
            assert path.read_bytes() in [block.payload for block in BLOCKS]

    @pytest.mark.parametrize("mode", [0, 1, 3, 4, 99, "text"])
    def test_nothing_is_unpickled(
        self, tmp_path: Path, place: Path, database: sqlite3.Connection, mode: int | str
    ) -> None:
        bomb = pickle.dumps(Explosive(tmp_path / "exploded"))
        for path in place.glob("0*/*/*.val"):
            path.write_bytes(bomb)
        database.execute("UPDATE Cache SET mode = ?, value = ?, size = ?", (mode, len(bomb), len(bomb)))
        database.execute("UPDATE Cache SET value = ?, filename = NULL WHERE rowid % 2", (bomb,))
        with closing(open_tier(place)) as tier:
            tier.match(HASHES)
            assert read(tier) == 0
            tier.discard(HASHES)
            assert tier.write(BLOCKS) == len(BLOCKS)
            assert read(tier) == len(BLOCKS)
        assert not (tmp_path / "exploded").exists()

    def test_keys_are_not_unpickled(self, tmp_path: Path, place: Path, database: sqlite3.Connection) -> None:
        bomb = pickle.dumps(Explosive(tmp_path / "exploded"))
        database.execute("UPDATE Cache SET key = ?, raw = 0 WHERE rowid = 1", (bomb,))
        database.execute("UPDATE Cache SET key = 7 WHERE rowid = 2")
        database.execute("UPDATE Cache SET key = zeroblob(10000000) WHERE rowid = 3")
        database.execute("UPDATE Cache SET key = ? WHERE rowid = 4", (MODEL.id + bytes(1000),))
        with closing(open_tier(place)) as tier:
            assert tier.stats()["blocks"] == len(BLOCKS) - 4
            assert read(tier) == len(BLOCKS) - 4
        assert not (tmp_path / "exploded").exists()

    def test_absurd_rows_are_not_even_fetched(self, place: Path, database: sqlite3.Connection) -> None:
        database.execute("UPDATE Cache SET value = zeroblob(10000000) WHERE rowid = 1")
        database.execute("UPDATE Cache SET filename = ? WHERE rowid = 2", ("0" * 10_000_000,))
        with closing(open_tier(place)) as tier:
            assert tier.stats()["blocks"] == len(BLOCKS) - 2
            assert read(tier) == len(BLOCKS) - 2

    @pytest.mark.parametrize(
        "name",
        [
            "../../secret",
            "{secret}",
            "cache.db",
            "",
            "0",
            "0/../../../secret",
            "0/{hash}-0123456789ab.val\n",
            7,
        ],
    )
    @pytest.mark.parametrize("way", ["read", "discard", "evict"])
    def test_files_elsewhere_are_neither_read_nor_removed(
        self, tmp_path: Path, place: Path, database: sqlite3.Connection, name: str | int, way: str
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(bytes(5000))
        if isinstance(name, str):
            name = name.format(secret=secret, hash="0" * 32)
        database.execute("UPDATE Cache SET filename = ?", (name,))
        with closing(open_tier(place)) as tier:
            match way:
                case "read":
                    assert read(tier) == 0
                case "discard":
                    tier.discard(HASHES)
                case "evict":
                    for number in range(100, 250):
                        tier.write([StoredBlock(bytes([number] * 16), bytes(16), 0, bytes(5000))])
                    assert tier.stats()["evictions"] > 8
                    assert read(tier) == 0
            assert tier.match(HASHES) == 0
        assert secret.read_bytes() == bytes(5000)
        assert (place / "000" / "cache.db").is_file()

    def test_lengths_are_capped(self, place: Path, database: sqlite3.Connection) -> None:
        for path in place.glob("0*/*/*.val"):
            os.truncate(path, 1 << 40)
        database.execute("UPDATE Cache SET value = ?, size = ?", (1 << 40, 1 << 40))
        with closing(open_tier(place)) as tier:
            assert read(tier) == 0
            assert tier.write(BLOCKS) == len(BLOCKS)
            assert read(tier) == len(BLOCKS)

    def test_the_size_is_added_up_afresh(self, place: Path, database: sqlite3.Connection) -> None:
        database.execute("UPDATE Settings SET value = ? WHERE key = 'size'", (-(1 << 50),))
        with closing(open_tier(place)) as tier:
            deadline = time.monotonic() + 20
            while tier.stats()["size_bytes"] < 8 * 8192 and time.monotonic() < deadline:
                time.sleep(0.01)
            for number in range(100, 250):
                tier.write([StoredBlock(bytes([number] * 16), bytes(16), 0, bytes(5000))])
            assert tier.stats()["evictions"] > 0


class TestSettings:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("disk_pickle_protocol", "x"),
            ("disk_min_file_size", 1 << 40),
            ("eviction_policy", "none"),
            ("size_limit", 1 << 60),
            ("cull_limit", -1),
            ("statistics", 1),
            ("tag_index", 1),
            ("disk_max_payload_bytes", 1 << 60),
            ("sqlite_synchronous", "full"),
            ("count", -5),
            ("hits", "many"),
        ],
    )
    def test_settings_in_the_database_do_not_matter(
        self, place: Path, database: sqlite3.Connection, key: str, value: object
    ) -> None:
        database.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, value))
        with closing(open_tier(place)) as tier:
            assert read(tier) == len(BLOCKS)
            for number in range(100, 250):
                tier.write([StoredBlock(bytes([number] * 16), bytes(16), 0, bytes(5000))])
            stats = tier.stats()
            assert stats["size_bytes"] <= stats["capacity_bytes"]
            assert stats["shards_reset"] == 0

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("_sql", 1),
            ("get", "x"),
            ("disk_remove", 1),
            ("disk_surprise", 1),
            ("sqlite_temp_store_directory", "'/tmp'"),
            ("sqlite_journal_mode", "wal; DROP TABLE Cache"),
            ("size", "huge"),
        ],
    )
    def test_a_shard_with_strange_settings_is_begun_anew(
        self, place: Path, database: sqlite3.Connection, key: str, value: object
    ) -> None:
        database.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, value))
        with closing(open_tier(place)) as tier:
            read(tier)
            tier.write(BLOCKS)
            tier.write(BLOCKS)
            assert tier.match(HASHES) == len(BLOCKS)
            assert read(tier) == len(BLOCKS)

    @pytest.mark.parametrize(
        "statement",
        [
            "DROP TABLE Cache",
            "DROP TABLE Settings",
            "DELETE FROM Settings",
            "ALTER TABLE Cache RENAME COLUMN filename TO other",
            "DROP TABLE Cache; CREATE VIEW Cache AS SELECT 1 AS key",
            "DROP INDEX Cache_key_raw",
            "CREATE TRIGGER bad BEFORE INSERT ON Cache BEGIN SELECT RAISE(ABORT, 'no'); END",
            "PRAGMA journal_mode = wal; UPDATE Cache SET tag = 1",
            "PRAGMA user_version = 7; UPDATE Cache SET expire_time = 1",
        ],
    )
    def test_a_strange_schema_costs_blocks_at_most(
        self, place: Path, database: sqlite3.Connection, statement: str
    ) -> None:
        database.executescript(statement)
        with closing(open_tier(place)) as tier:
            read(tier)
            tier.write(BLOCKS)
            read(tier)
            tier.write(BLOCKS)
            assert tier.match(HASHES) == len(BLOCKS)
            assert read(tier) == len(BLOCKS)


class TestPlaces:
    @pytest.mark.parametrize("what", ["file", "database folder", "database link", "database fifo"])
    def test_something_else_in_a_shard_s_place(self, tmp_path: Path, place: Path, what: str) -> None:
        shard, elsewhere = place / "000", tmp_path / "elsewhere"
        elsewhere.mkdir()
        make: dict[str, Callable[[], object]] = {
            "file": lambda: shard.write_text("not a directory"),
            "database folder": lambda: (shard / "cache.db").mkdir(parents=True),
            "database link": lambda: (shard.mkdir(), (shard / "cache.db").symlink_to(elsewhere / "db")),
            "database fifo": lambda: (shard.mkdir(), os.mkfifo(shard / "cache.db")),
        }
        os.rename(shard, tmp_path / "away")
        make[what]()
        with closing(open_tier(place)) as tier:
            assert read(tier) == 0
            assert tier.write(BLOCKS) == len(BLOCKS)
            assert read(tier) == len(BLOCKS)
        assert list(elsewhere.iterdir()) == []

    def test_many_shards_do_not_count(self, tmp_path: Path) -> None:
        for number in range(100):
            (tmp_path / f"{number:03d}").mkdir()
        with closing(open_tier(tmp_path)) as tier:
            assert tier.stats()["shards"] == 8
            assert tier.write(BLOCKS) == len(BLOCKS)


values = st.one_of(st.none(), st.integers(), st.text(), st.binary(), st.floats())


@given(mode=st.one_of(values, st.just(2)), filename=values, value=values)
def test_fetch_refuses_what_store_did_not_make(mode: object, filename: object, value: object) -> None:
    files = BlockFiles("/proc/self", max_payload_bytes=100)
    with pytest.raises(CorruptBlock):
        files.fetch(mode, filename, value, False)
    files.remove(filename)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    files = BlockFiles(str(tmp_path), max_payload_bytes=100)
    file = files.write(files.name(bytes(16)), memoryview(b"x" * 50))
    opened = files.open(file)
    assert opened.read() == b"x" * 50
    os.truncate(tmp_path / file.name, 49)
    with pytest.raises(CorruptBlock, match="49 of 50"):
        opened.read()
    os.close(opened.descriptor)
    with pytest.raises(CorruptBlock, match="49 bytes"):
        files.open(file)


def test_keys_are_raw_bytes_both_ways(tmp_path: Path) -> None:
    files = BlockFiles(str(tmp_path))
    assert files.get(*files.put(b"key")) == b"key"
    with pytest.raises(TypeError):
        files.put("text")  # type: ignore[arg-type]
    with pytest.raises(CorruptBlock):
        files.get(pickle.dumps("text"), False)
    with pytest.raises(CorruptBlock):
        files.get(1 << 40, True)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(28, "No space left on device"), "full"),
        (OSError(122, "Disk quota exceeded"), "full"),
        (PermissionError(13, "Permission denied"), "read_only"),
        (OSError(30, "Read-only file system"), "read_only"),
        (OSError(5, "Input/output error"), "io"),
        (sqlite3.OperationalError("database or disk is full"), "full"),
        (sqlite3.OperationalError("database is locked"), "busy"),
        (Timeout(), "busy"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "read_only"),
        (sqlite3.OperationalError("no such table: Cache"), "corrupt"),
        (sqlite3.OperationalError("disk I/O error"), "io"),
        (sqlite3.OperationalError("unable to open database file"), "io"),
        (sqlite3.DatabaseError("file is not a database"), "corrupt"),
        (sqlite3.OperationalError("cannot start a transaction within a transaction"), "io"),
        (sqlite3.OperationalError("views may not be indexed"), "corrupt"),
        (sqlite3.ProgrammingError("Cannot operate on a closed database."), "io"),
        (sqlite3.ProgrammingError("You can only execute one statement at a time."), "corrupt"),
        (CorruptBlock("short"), "corrupt"),
        (TierUnavailable("later"), "io"),
        (MemoryError(), "io"),
        (RuntimeError("can't start new thread"), "io"),
    ],
)
def test_causes(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


def test_a_rollback_that_fails_does_not_hide_the_cause() -> None:
    error = sqlite3.OperationalError("cannot rollback - no transaction is active")
    error.__context__ = sqlite3.OperationalError("database or disk is full")
    assert cause_of(error) == "full"
