"""The disk tier: bounds, eviction, misses."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from diskcache import Cache

from kvtier.errors import ConfigError
from kvtier.tiers.disk import DiskTier
from tests.disk_support import (
    MAX_PAYLOAD_BYTES,
    MODEL,
    ONE_SHARD,
    block,
    blocks,
    eventually,
    files,
    open_tier,
    read,
    rows,
)


class TestSizes:
    def test_a_bound_below_a_few_blocks_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"100000 bytes.* 8192 bytes.* 262144"):
            DiskTier(tmp_path, 100_000, MODEL, MAX_PAYLOAD_BYTES)
        with closing(DiskTier(tmp_path, 262_144, MODEL, MAX_PAYLOAD_BYTES)) as tier:
            assert tier.write(blocks(range(3))) == 3

    @pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, MAX_PAYLOAD_BYTES])
    def test_keeps_every_length(self, tmp_path: Path, length: int) -> None:
        with closing(open_tier(tmp_path)) as tier:
            assert tier.write([block(1, length)]) == 1
            assert read(tier, [block(1, length)]) == [1]
        with closing(open_tier(tmp_path)) as tier:
            assert read(tier, [block(1, length)]) == [1]

    def test_larger_payloads_are_refused(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as tier:
            assert tier.write([block(1, MAX_PAYLOAD_BYTES + 1), block(2)]) == 1
            assert read(tier, [block(1), block(2)]) == [2]
            assert tier.stats()["oversized"] == 1
        assert len(files(tmp_path)) == 1

    def test_files_stay_within_the_bound(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What lies on the disk counts, blocks of the file system included, also just before it evicts."""

        def used() -> int:
            total = 0
            for path in [*files(tmp_path), *tmp_path.glob("0*/cache.db*")]:
                with suppress(FileNotFoundError):
                    total += path.stat().st_blocks * 512
            return total

        before_evicting: list[int] = []
        cull = Cache.cull
        monkeypatch.setattr(Cache, "cull", lambda cache: (before_evicting.append(used()), cull(cache))[1])
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            for number in range(400):
                tier.write([block(number, 1 + 97 * number % MAX_PAYLOAD_BYTES)])
                assert used() <= ONE_SHARD
            assert tier.stats()["evictions"] > 100
            assert ONE_SHARD // 2 < max(before_evicting) <= ONE_SHARD

    def test_a_smaller_bound_takes_effect(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, 5 << 20)) as tier:
            tier.write(blocks(range(500)))
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(1000, 1200)))
            assert eventually(lambda: tier.stats()["size_bytes"] <= ONE_SHARD)

    def test_the_number_of_shards_stays(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, 64 << 20)) as tier:
            assert tier.stats()["shards"] == 8
            tier.write(blocks(range(50)))
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            assert tier.stats()["shards"] == 8
            assert read(tier, blocks(range(50))) == list(range(50))

    def test_a_small_tier_has_few_shards(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            assert tier.stats()["shards"] == 1


def test_other_users_cannot_read_what_is_kept(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "there").mkdir(mode=0o755)
        for root in (tmp_path / "made", tmp_path / "there"):
            with closing(open_tier(root)) as tier:
                assert tier.write(blocks(range(8))) == 8
            assert len(files(root)) == 8
            assert {file.stat().st_mode & 0o077 for file in files(root)} == {0}
        assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "there").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


class TestEviction:
    def test_what_was_read_stays_longer(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(60)))
            assert read(tier, blocks(range(10))) == list(range(10))
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(100, 180)))
            remaining = read(tier, blocks(range(60)))
        assert remaining[:10] == list(range(10))
        assert len(remaining) < 50

    def test_access_times_are_written_without_being_closed(self, tmp_path: Path) -> None:
        with closing(DiskTier(tmp_path, ONE_SHARD, MODEL, MAX_PAYLOAD_BYTES, retry_seconds=0.05)) as tier:
            tier.write(blocks(range(3)))
            before = dict(rows(tmp_path, "key, access_time"))
            read(tier, [block(1)])
            key = MODEL.id + block(1).hash

            def touched() -> list[object]:
                after = dict(rows(tmp_path, "key, access_time"))
                return [name for name in after if after[name] != before[name]]

            assert eventually(lambda: touched() == [key])

    def test_the_tail_of_a_chain_goes_before_its_head(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(60)))
            read(tier, blocks(range(60)))
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(100, 180)))
            remaining = read(tier, blocks(range(60)))
        assert 0 < len(remaining) < 50
        assert remaining == list(range(len(remaining)))

    def test_evicted_blocks_are_forgotten(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(400)))
            held = [one for one in blocks(range(400)) if tier.match([one.hash])]
            assert len(held) == tier.stats()["blocks"] == len(rows(tmp_path)) == len(files(tmp_path))
            assert read(tier, held) == [one.position for one in held]


class TestMisses:
    @pytest.mark.parametrize(
        "damage", ["gone", "short", "long", "empty", "fifo", "folder", "link", "dangling"]
    )
    def test_a_damaged_file_is_a_miss_and_heals(self, tmp_path: Path, damage: str) -> None:
        wanted = blocks(range(10))
        elsewhere = tmp_path / "elsewhere"
        elsewhere.write_bytes(wanted[3].payload)
        with closing(open_tier(tmp_path / "tier")) as tier:
            tier.write(wanted)
            (victim,) = [path for path in files(tmp_path / "tier") if wanted[3].hash.hex() in path.name]
            match damage:
                case "short":
                    os.truncate(victim, 4999)
                case "long":
                    os.truncate(victim, 5001)
                case "empty":
                    os.truncate(victim, 0)
                case _:
                    victim.unlink()
            match damage:
                case "fifo":
                    os.mkfifo(victim)
                case "folder":
                    victim.mkdir()
                case "link":
                    victim.symlink_to(elsewhere)
                case "dangling":
                    victim.symlink_to(tmp_path / "nowhere")
            remaining = [number for number in range(10) if number != 3]
            assert read(tier, wanted) == remaining
            assert tier.match([one.hash for one in wanted]) == 3
            tier.write(wanted)
            read(tier, wanted)
            assert tier.write(wanted) == 10
            assert read(tier, wanted) == list(range(10))
            assert tier.stats()["shards_reset"] == 0
        assert elsewhere.read_bytes() == wanted[3].payload

    def test_a_block_that_memory_does_not_suffice_for_is_a_miss_for_now(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(open_tier(tmp_path)) as tier:
            tier.write(blocks(range(3)))

            def fail(*_: object) -> bytes:
                raise MemoryError

            with monkeypatch.context() as patch:
                patch.setattr("kvtier.codec.source.os.pread", fail)
                assert read(tier, blocks(range(3))) == []
            assert tier.stats()["errors_io"] == 3
            assert read(tier, blocks(range(3))) == [0, 1, 2]

    def test_a_discarded_block_does_not_come_back(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as tier:
            tier.write(blocks(range(5)))
            tier.discard([block(2).hash])
            assert len(files(tmp_path)) == 4
        with closing(open_tier(tmp_path)) as tier:
            assert read(tier, blocks(range(5))) == [0, 1, 3, 4]

    def test_a_locked_shard_is_a_miss_for_now_where_its_rows_are_needed(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(3)))
            with closing(sqlite3.connect(tmp_path / "000" / "cache.db", isolation_level=None)) as other:
                other.execute("BEGIN EXCLUSIVE")
                assert read(tier, blocks(range(3))) == [0, 1, 2], "which file it is, is known"
                (name,) = [file for file in files(tmp_path) if block(0).hash.hex() in file.name]
                name.rename(tmp_path / "away")
                assert read(tier, [block(0)]) == []
                (tmp_path / "away").rename(name)
                assert tier.write([block(9)]) == 0
                assert tier.match([block(0).hash]) == 1, "the block is there, and will be read again"
            assert tier.stats()["errors_busy"] >= 2
            assert tier.stats()["writable"] == 1
            assert tier.write([block(9)]) == 1
            assert read(tier, blocks(range(3))) == [0, 1, 2]
            assert len(files(tmp_path)) == 4, "a write that failed leaves no file"

    def test_a_commit_that_failed_does_not_stop_later_ones(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, ONE_SHARD)) as tier:
            tier.write(blocks(range(3)))
            with closing(sqlite3.connect(tmp_path / "000" / "cache.db", isolation_level=None)) as other:
                other.execute("BEGIN")
                other.execute("SELECT * FROM Cache").fetchall()
                assert tier.write([block(9)]) == 0
                assert read(tier, blocks(range(3))) == [0, 1, 2]
            assert tier.write([block(9)]) == 1
            assert read(tier, [block(9)]) == [9]
            assert len(files(tmp_path)) == len(rows(tmp_path)) == 4


class TestTheRest:
    def test_match_needs_no_disk(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path / "tier")) as tier:
            tier.write(blocks(range(5)))
            os.rename(tmp_path / "tier", tmp_path / "away")
            assert tier.match([one.hash for one in blocks(range(6))]) == 5
            os.rename(tmp_path / "away", tmp_path / "tier")

    def test_makes_its_directory(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path / "a" / "b $HOME ~")) as tier:
            assert tier.write(blocks(range(5))) == 5
            assert read(tier, blocks(range(5))) == list(range(5))

    def test_counts(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path)) as tier:
            tier.write(blocks(range(5)))
            tier.write(blocks(range(6)))
            read(tier, blocks(range(8)))
            stats = tier.stats()
        assert (stats["writes"], stats["hits"], stats["misses"], stats["blocks"]) == (6, 6, 2, 6)
        assert stats["writable"] == 1
        assert 6 * 8192 <= stats["size_bytes"] < 1 << 20

    def test_maps_no_file(self, tmp_path: Path) -> None:
        """A mapped file that somebody truncates ends the process by SIGBUS."""
        with closing(open_tier(tmp_path)) as tier:
            tier.write(blocks(range(50)))
            read(tier, blocks(range(50)))
            with open("/proc/self/maps") as maps:
                assert str(tmp_path) not in maps.read()

    def test_close_ends_its_threads_and_closes_its_files(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())
        tier = open_tier(tmp_path)
        tier.write(blocks(range(20)))
        read(tier, blocks(range(20)))
        tier.close()
        assert eventually(lambda: set(threading.enumerate()) <= before)

        def still_open() -> list[str]:
            links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
            return [path for path in map(os.path.realpath, links) if path.startswith(str(tmp_path))]

        assert eventually(lambda: not still_open())
