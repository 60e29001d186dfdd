"""The disk tier on full and read-only disks, and where it may not write."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier
from tests.disk_support import eventually
from tests.faults.disk_support import (
    LARGE_BYTES,
    MODEL,
    ROOMY,
    block,
    blocks,
    open_tier,
    processes,
    read,
    without_row,
)


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
