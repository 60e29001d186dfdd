"""The disk tier under SIGKILL, full and read-only disks, and databases that are damaged under it."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvtier.hashing import Namespace
from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier

MODEL = Namespace.from_facts({"model": "a"})
MAX_PAYLOAD_BYTES = 16384
LARGE_BYTES = 256 << 10
BOUNDLESS = 64 << 30
ROOMY = 16 << 20
TIGHT = 1 << 20

# Children are forked from a server that has imported this module, so that a kill needs no new interpreter.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])


def name_of(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def block(number: int) -> StoredBlock:
    source = random.Random(number)
    return StoredBlock(
        name_of(number), bytes(16), number, source.randbytes(source.randint(1, MAX_PAYLOAD_BYTES))
    )


def blocks(numbers: range) -> list[StoredBlock]:
    return [block(number) for number in numbers]


def open_tier(path: Path, size_bytes: int = ROOMY) -> DiskTier:
    return DiskTier(path, size_bytes, MODEL, MAX_PAYLOAD_BYTES, retry_seconds=0.1)


def read(tier: DiskTier, wanted: Sequence[StoredBlock]) -> list[int]:
    """Read, check every payload, and return the numbers of the blocks that were there."""
    delivered: dict[bytes, bytes | None] = {}
    tier.read(
        [one.hash for one in wanted],
        lambda name, payload: delivered.__setitem__(name, None if payload is None else bytes(payload)),
    )
    assert len(delivered) == len(wanted)
    found = [one for one in wanted if delivered[one.hash] is not None]
    assert all(delivered[one.hash] == one.payload for one in found)
    return [one.position for one in found]


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def without_row(path: Path) -> set[str]:
    """Return the block files that no database names."""
    found: set[str] = set()
    for shard in path.glob("0*"):
        with closing(sqlite3.connect(shard / "cache.db")) as database:
            named = {name for (name,) in database.execute("SELECT filename FROM Cache")}
        found |= {str(file) for file in shard.glob("*/*.val") if str(file.relative_to(shard)) not in named}
    return found


def used_bytes(path: Path) -> int:
    """Return what the files below `path` take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file())


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


@contextlib.contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[None]:
    """Mount a file system of its own at `path`."""
    path.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs"]
    try:
        mounted = subprocess.run(["mount", *options, str(path)], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


class TestFullDisk:
    def test_misses_and_goes_on_when_there_is_room_again(self, tmp_path: Path) -> None:
        wanted = blocks(range(200))
        with small_disk(tmp_path / "disk", 1 << 20), closing(open_tier(tmp_path / "disk")) as tier:
            held = tier.write(wanted)
            assert 20 < held < 200
            assert tier.stats()["errors_full"] > 0
            assert eventually(lambda: tier.write(wanted) < 200 and tier.stats()["writable"] == 0)
            found = read(tier, wanted)
            assert len(found) >= held
            assert without_row(tmp_path / "disk") == set()
            tier.discard([block(number).hash for number in found[: len(found) // 2]])
            fresh = blocks(range(1000, 1005))
            assert eventually(lambda: tier.write(fresh) == 5)
            assert read(tier, fresh) == list(range(1000, 1005))
            assert tier.stats()["writable"] == 1

    def test_full_from_the_beginning(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk", 1 << 20):
            filler = tmp_path / "disk" / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with closing(open_tier(tmp_path / "disk")) as tier:
                assert tier.write(blocks(range(5))) == 0
                assert read(tier, blocks(range(5))) == []
                assert tier.stats()["writable"] == 0
                assert tier.stats()["errors_full"] > 0
                filler.unlink()
                assert eventually(lambda: tier.write(blocks(range(5))) == 5)
                assert read(tier, blocks(range(5))) == list(range(5))

    def test_a_limit_on_the_size_of_files(self, tmp_path: Path) -> None:
        """For where nothing can be mounted: every other block is too large for the file system."""
        result = run_in_child(write_with_small_files, tmp_path)
        assert result == {"small": 10, "large": 0, "found": 10, "orphans": 0, "errors_full": 10}
        with closing(DiskTier(tmp_path, ROOMY, MODEL, LARGE_BYTES)) as tier:
            assert len(read(tier, small_and_large())) == 10
            assert tier.write(small_and_large()) == 20


class TestReadOnlyDisk:
    def test_opened_read_only(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        with small_disk(disk, 4 << 20):
            with closing(open_tier(disk)) as tier:
                tier.write(blocks(range(10)))
            # Until the tier's threads are gone, its files are open.
            remount = ["mount", "-o", "remount,ro", str(disk)]
            assert eventually(lambda: subprocess.run(remount, capture_output=True).returncode == 0)
            with closing(open_tier(disk)) as tier:
                read(tier, blocks(range(10)))
                assert tier.write(blocks(range(10, 20))) == 0
                stats = tier.stats()
                assert stats["writable"] == 0
                assert stats["errors_read_only"] + stats["errors_io"] > 0
                assert stats["shards_reset"] == 0
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
                assert eventually(lambda: tier.write(blocks(range(20))) == 20)
                assert read(tier, blocks(range(20))) == list(range(20))
                assert tier.stats()["writable"] == 1

    def test_no_permission(self, tmp_path: Path) -> None:
        result = run_in_child(write_without_permission, tmp_path)
        assert result["held"] == 0
        assert result["writable"] == 0
        assert result["errors_read_only"] + result["errors_io"] > 0
        assert result["found_once_allowed"] == 5

    def test_a_path_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "tier").write_text("not a directory")
        with closing(open_tier(tmp_path / "tier")) as tier:
            assert tier.write(blocks(range(5))) == 0
            assert read(tier, blocks(range(5))) == []
            assert tier.stats()["writable"] == 0
            (tmp_path / "tier").unlink()
            assert eventually(lambda: tier.write(blocks(range(5))) == 5)


def run_in_child(work: Callable[[Path, Connection], None], path: Path) -> dict[str, int]:
    """Run `work` in a process of its own, which may limit itself; return what it sends."""
    receiving, sending = processes.Pipe(duplex=False)
    process = processes.Process(target=work, args=(path, sending), daemon=True)
    process.start()
    sending.close()
    try:
        assert receiving.poll(60)
        result: dict[str, int] = receiving.recv()
    finally:
        process.kill()
        process.join()
    return result


def small_and_large() -> list[StoredBlock]:
    sizes = [1000, LARGE_BYTES] * 10
    return [StoredBlock(bytes([n] * 16), bytes(16), n, bytes([n]) * size) for n, size in enumerate(sizes)]


def write_with_small_files(path: Path, result: Connection) -> None:
    tier = DiskTier(path, ROOMY, MODEL, LARGE_BYTES, retry_seconds=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE_BYTES // 2, resource.RLIM_INFINITY))
    result.send(
        {
            "small": sum(tier.write([one]) for one in small_and_large()[::2]),
            "large": sum(tier.write([one]) for one in small_and_large()[1::2]),
            "found": len(read(tier, small_and_large())),
            "orphans": len(without_row(path)),
            "errors_full": int(tier.stats()["errors_full"]),
        }
    )


def write_without_permission(path: Path, result: Connection) -> None:
    place = path / "tier"
    place.mkdir()
    place.chmod(0o555)
    path.chmod(0o755)
    if os.getuid() == 0:
        os.seteuid(65534)
    tier = open_tier(place)
    held = tier.write(blocks(range(5)))
    stats = {name: int(tier.stats()[name]) for name in ("writable", "errors_read_only", "errors_io")}
    if os.getuid() == 0:
        os.seteuid(0)
    place.chmod(0o755)
    eventually(lambda: tier.write(blocks(range(5))) == 5)
    result.send({"held": held, "found_once_allowed": len(read(tier, blocks(range(5)))), **stats})
