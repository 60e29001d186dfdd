"""Shared by the disk tier's tests of faults: blocks that follow from numbers, and what lies on a disk."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

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
