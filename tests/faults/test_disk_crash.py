"""The disk tier under SIGKILL, and databases that are damaged under it."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier
from tests.disk_support import eventually
from tests.faults.disk_support import (
    BOUNDLESS,
    TIGHT,
    blocks,
    name_of,
    open_tier,
    processes,
    read,
    used_bytes,
    without_row,
)


def write_for_ever(path: Path, size_bytes: int, first: int, done: Connection) -> None:
    """Write blocks in batches, report each batch, read some of them back and discard a few."""
    tier = open_tier(path, size_bytes)
    source = random.Random(first)
    number = first
    while True:
        batch = blocks(range(number, number + source.randint(1, 6)))
        number += len(batch)
        held = tier.write(batch)
        done.send((batch[0].position, number, held))
        if source.random() < 0.3:
            read(tier, batch)
        if source.random() < 0.1:
            tier.discard([name_of(number + 10**9)])


class Writer:
    """A process that writes until it is killed."""

    def __init__(self, path: Path, size_bytes: int, first: int) -> None:
        self.reports, done = processes.Pipe(duplex=False)
        self.process = processes.Process(
            target=write_for_ever, args=(path, size_bytes, first, done), daemon=True
        )
        self.process.start()
        done.close()

    def kill(self, after: float) -> list[tuple[int, int, int]]:
        """Kill it `after` seconds after its first batch; return its reports: first, end, number held."""
        reports = [self.reports.recv()]
        time.sleep(after)
        self.process.kill()
        self.process.join()
        assert self.process.exitcode == -signal.SIGKILL
        with contextlib.suppress(EOFError):
            while True:
                reports.append(self.reports.recv())
        return reports


@pytest.fixture
def source() -> random.Random:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    return random.Random(seed)


class TestSigkill:
    def test_what_was_written_is_there_and_whole(self, tmp_path: Path, source: random.Random) -> None:
        """Killed at 25 random moments: every block that `write` had returned for can be read, exactly."""
        written = 0
        for _ in range(25):
            first = written
            reports = Writer(tmp_path, BOUNDLESS, first).kill(after=source.uniform(0, 0.06))
            for start, end, held in reports:
                assert (start, held) == (written, end - start)
                written = end
            with closing(open_tier(tmp_path, BOUNDLESS)) as tier:
                assert tier.match([name_of(number) for number in range(written)]) == written
                assert read(tier, blocks(range(first, written))) == list(range(first, written))
                # The batch that was cut off is there in part; what is there is exact.
                read(tier, blocks(range(written, written + 6)))
                tier.discard([name_of(number) for number in range(written, written + 6)])
                assert tier.stats()["shards_reset"] == tier.stats()["errors_corrupt"] == 0
        assert written > 100

    def test_the_bound_holds_over_many_crashes(self, tmp_path: Path, source: random.Random) -> None:
        """Two processes write to a small tier and are killed, 15 times: nothing of that stays behind."""
        for turn in range(15):
            writers = [Writer(tmp_path, TIGHT, first=1000 * (2 * turn + one)) for one in range(2)]
            reports = [report for one in writers for report in one.kill(after=source.uniform(0, 0.08))]
            with closing(open_tier(tmp_path, TIGHT)) as tier:
                assert eventually(lambda: not without_row(tmp_path))
                for start, end, _ in reports:
                    read(tier, blocks(range(start, end)))
                assert tier.write(blocks(range(3))) == 3
                assert tier.stats()["shards_reset"] == tier.stats()["errors_corrupt"] == 0
                assert used_bytes(tmp_path) <= TIGHT
        assert used_bytes(tmp_path) > TIGHT // 2


def garbage(path: Path, source: random.Random) -> None:
    path.write_bytes(source.randbytes(path.stat().st_size))


def holes(path: Path, source: random.Random) -> None:
    with path.open("r+b") as file:
        for _ in range(30):
            file.seek(source.randrange(path.stat().st_size))
            file.write(source.randbytes(64))


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "random bytes": garbage,
    "random bytes in places": holes,
    "empty": lambda path, source: os.truncate(path, 0),
    "short": lambda path, source: os.truncate(path, source.randrange(path.stat().st_size)),
    "gone": lambda path, source: path.unlink(),
    "journal garbage": lambda path, source: Path(f"{path}-journal").write_bytes(source.randbytes(9000)),
    "log garbage": lambda path, source: Path(f"{path}-wal").write_bytes(source.randbytes(9000)),
    "folder gone": lambda path, source: shutil.move(path.parent, path.parent.with_name("away")),
}


class TestDamagedDatabase:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_at_rest(self, tmp_path: Path, source: random.Random, damage: str) -> None:
        wanted = blocks(range(40))
        with closing(open_tier(tmp_path, TIGHT)) as tier:
            tier.write(wanted)
        DAMAGES[damage](tmp_path / "000" / "cache.db", source)
        with closing(open_tier(tmp_path, TIGHT)) as tier:
            self.check_recovery(tier, wanted)
            assert tier.write(wanted) == 40
        with closing(open_tier(tmp_path, TIGHT)) as tier:
            assert read(tier, wanted) == list(range(40))
            assert eventually(lambda: not list(tmp_path.glob("*damaged*")))

    def test_a_log_that_appears_beside_an_open_database(self, tmp_path: Path, source: random.Random) -> None:
        wanted = blocks(range(40))
        with closing(open_tier(tmp_path, TIGHT)) as tier:
            tier.write(wanted)
            DAMAGES["log garbage"](tmp_path / "000" / "cache.db", source)
            assert eventually(lambda: tier.stats()["shards_reset"] > 0)
            self.check_recovery(tier, wanted)

    # A connection that a new thread opens beside such a log waits a minute, so that is a test of its own.
    @pytest.mark.parametrize("damage", [damage for damage in DAMAGES if damage != "log garbage"])
    def test_while_it_is_open(self, tmp_path: Path, source: random.Random, damage: str) -> None:
        wanted = blocks(range(40))
        with closing(open_tier(tmp_path, TIGHT)) as tier:
            tier.write(wanted)
            read(tier, wanted)
            DAMAGES[damage](tmp_path / "000" / "cache.db", source)
            self.check_recovery(tier, wanted)
            assert eventually(lambda: not list(tmp_path.glob("*damaged*")))

    def test_files_without_their_database_are_removed(self, tmp_path: Path) -> None:
        with closing(open_tier(tmp_path, TIGHT)) as tier:
            tier.write(blocks(range(40)))
            (tmp_path / "000" / "cache.db").unlink()
            assert eventually(lambda: tier.stats()["shards_reset"] > 0)
            assert eventually(lambda: not list(tmp_path.rglob("*.val")))
            assert tier.write(blocks(range(40))) == 40

    def check_recovery(self, tier: DiskTier, wanted: list[StoredBlock]) -> None:
        """Whatever happened: no exception, no wrong byte, and after a while everything is held again."""

        def all_back() -> bool:
            read(tier, wanted)
            return tier.write(wanted) == len(wanted) and len(read(tier, wanted)) == len(wanted)

        assert eventually(all_back)
        assert tier.stats()["writable"] == 1

    def test_while_others_read_and_write(self, tmp_path: Path, source: random.Random) -> None:
        """Shards are damaged one after another under four threads."""
        wanted = blocks(range(60))
        failures: list[BaseException] = []
        stop = threading.Event()
        with closing(open_tier(tmp_path)) as tier:
            tier.write(wanted)

            def work() -> None:
                try:
                    while not stop.is_set():
                        read(tier, wanted)
                        tier.write(wanted)
                        tier.match([one.hash for one in wanted])
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for turn in range(16):
                database = tmp_path / f"{turn % 8:03d}" / "cache.db"
                with contextlib.suppress(FileNotFoundError, ValueError):
                    source.choice([garbage, holes])(database, source)
                time.sleep(0.03)
            stop.set()
            for thread in threads:
                thread.join()
            assert not failures
            assert tier.stats()["shards_reset"] > 0
            self.check_recovery(tier, wanted)
