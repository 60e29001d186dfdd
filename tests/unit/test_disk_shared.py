"""A directory of the disk tier that several share: namespaces, processes, and what a killed one leaves."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from kvtier.tiers.disk import DiskTier
from tests.disk_support import (
    MAX_PAYLOAD_BYTES,
    MODEL,
    ONE_SHARD,
    OTHER_MODEL,
    block,
    blocks,
    eventually,
    files,
    never_looking,
    open_tier,
    read,
    rows,
)


class TestNamespaces:
    def test_do_not_mix(self, tmp_path: Path) -> None:
        ours, theirs = block(1), block(1, salt="other model")
        assert ours.hash == theirs.hash
        with (
            closing(open_tier(tmp_path)) as one,
            closing(open_tier(tmp_path, namespace=OTHER_MODEL)) as other,
        ):
            one.write([ours])
            assert read(other, [ours]) == []
            assert other.write([theirs]) == 1
            assert read(one, [ours]) == read(other, [theirs]) == [1]
            other.discard([theirs.hash])
            assert read(one, [ours]) == [1]
        with closing(open_tier(tmp_path, namespace=OTHER_MODEL)) as other:
            assert other.match([ours.hash]) == 0

    def test_share_the_bound(self, tmp_path: Path) -> None:
        """The blocks of a model that is not served any more make room for the present one's."""
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(200)))
        with closing(open_tier(tmp_path, ONE_SHARD, OTHER_MODEL)) as tier:
            tier.write(blocks(range(200)))
            assert tier.stats()["size_bytes"] <= ONE_SHARD
            assert len(read(tier, blocks(range(200)))) > 50
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            assert read(tier, blocks(range(200))) == []


class TestTwoTiersInOneDirectory:
    def test_blocks_of_the_other_are_not_written_again(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as one, closing(never_looking(tmp_path)) as other:
            one.write(blocks(range(20)))
            # As it is before it has looked.
            for shard in other._shards:
                shard.held.clear()
            assert other.match([block(0).hash]) == 0
            assert other.write(blocks(range(20))) == 20
            assert other.stats()["writes"] == 0
            assert read(other, blocks(range(20))) == list(range(20))

    def test_what_the_other_evicted_is_a_miss(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as one, closing(open_tier(tmp_path, ONE_SHARD)) as other:
            one.write(blocks(range(50)))
            other.write(blocks(range(50, 300)))
            assert one.match([block(0).hash]) == 1
            assert read(one, blocks(range(50))) == []
            assert one.match([block(0).hash]) == 0
            assert one.write(blocks(range(50))) == 50

    def test_a_file_that_another_tier_replaced_is_found(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as tier, closing(open_tier(tmp_path)) as other:
            tier.write(blocks(range(4)))
            before = set(files(tmp_path))
            other.discard([block(2).hash])
            assert other.write([block(2)]) == 1
            assert set(files(tmp_path)) != before
            assert read(tier, blocks(range(4))) == [0, 1, 2, 3]

    def test_after_a_restart_no_row_is_needed_for_a_read(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(3)))
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            with closing(sqlite3.connect(tmp_path / "000" / "cache.db", isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                assert read(tier, blocks(range(3))) == [0, 1, 2]
            assert tier.stats().get("errors_busy", 0) == 0

    def test_a_running_tier_learns_of_what_another_writes(self, tmp_path: Path) -> None:
        with (
            closing(DiskTier(tmp_path, 2 << 20, MODEL, MAX_PAYLOAD_BYTES, retry_seconds=0.05)) as running,
            closing(open_tier(tmp_path)) as other,
            closing(open_tier(tmp_path, namespace=OTHER_MODEL)) as foreign,
        ):
            mine, theirs = blocks(range(5)), blocks(range(5, 25))
            assert running.write(mine) == 5
            assert foreign.write(blocks(range(50, 60))) == 10
            assert other.write(theirs) == 20
            assert eventually(lambda: running.match([one.hash for one in theirs]) == 20)
            assert read(running, mine + theirs) == list(range(25))
            assert running.match([block(50).hash]) == 0

    def test_both_write_the_same_blocks_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # On a busy machine the other may take longer than a writer waits for it.
        monkeypatch.setattr("kvtier.tiers.disk_shard._BUSY_SECONDS", 60.0)
        wanted = blocks(range(60))
        with closing(open_tier(tmp_path)) as one, closing(open_tier(tmp_path)) as other:
            counts: list[int] = []
            threads = [
                threading.Thread(target=lambda tier=tier: counts.append(tier.write(wanted)))
                for tier in (one, other, one, other)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert counts == [60] * 4
            # Replacing a block that the other has just written is a moment's miss for its readers.
            assert one.write(wanted) == other.write(wanted) == 60
        with closing(open_tier(tmp_path)) as tier:
            assert read(tier, wanted) == list(range(60))
        assert len(rows(tmp_path)) == len(files(tmp_path)) == 60


class TestOrphans:
    def make_orphan(self, path: Path, age: float) -> Path:
        orphan = path / "000" / "a" / f"ab{'0' * 30}-{'1' * 12}.val"
        orphan.parent.mkdir(exist_ok=True, parents=True)
        orphan.write_bytes(b"left by a crash")
        os.utime(orphan, (time.time() - age, time.time() - age))
        return orphan

    def test_are_removed_at_the_next_start(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as tier:
            tier.write(blocks(range(30)))
        orphan = self.make_orphan(tmp_path, age=5)
        with closing(open_tier(tmp_path)) as tier:
            assert eventually(lambda: not orphan.exists())
            assert read(tier, blocks(range(30))) == list(range(30))
            assert tier.stats()["orphans_removed"] == 1

    def test_may_be_another_tier_s_files_in_the_making(self, tmp_path: Path) -> None:
        first = self.make_orphan(tmp_path, age=5)
        with closing(open_tier(tmp_path)):
            assert eventually(lambda: not first.exists()), "the first tier is done with sweeping"
            old = self.make_orphan(tmp_path, age=5)
            os.utime(old, (0, 0))
            old = old.rename(old.with_name(f"ab{'2' * 30}-{'1' * 12}.val"))
            young = self.make_orphan(tmp_path, age=5)
            with closing(open_tier(tmp_path)):
                assert eventually(lambda: not old.exists())
                assert young.exists()

    def test_nothing_else_is_removed(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as tier:
            tier.write(blocks(range(3)))
        orphan = self.make_orphan(tmp_path, age=5)
        strangers = [
            tmp_path / "000" / "a" / "notes.txt",
            tmp_path / "000" / "notes.val",
            tmp_path / "notes",
        ]
        for stranger in strangers:
            stranger.write_text("mine")
            os.utime(stranger, (0, 0))
        with closing(open_tier(tmp_path)):
            assert eventually(lambda: not orphan.exists())
        assert all(stranger.exists() for stranger in strangers)
