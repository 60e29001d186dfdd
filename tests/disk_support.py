"""Disk tiers for tests, and blocks to keep in them."""

from __future__ import annotations

import hashlib
import random
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from kvtier.hashing import Namespace
from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier

MODEL = Namespace.from_facts({"model": "a"})
OTHER_MODEL = Namespace.from_facts({"model": "b"})
MAX_PAYLOAD_BYTES = 8192
ONE_SHARD = 900 << 10


def block(number: int, length: int = 5000, salt: str = "") -> StoredBlock:
    name = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    return StoredBlock(name, bytes(16), number, random.Random(f"{number}{salt}").randbytes(length))


def blocks(numbers: range, length: int = 5000) -> list[StoredBlock]:
    return [block(number, length) for number in numbers]


def open_tier(path: Path, size_bytes: int = 2 << 20, namespace: Namespace = MODEL) -> DiskTier:
    return DiskTier(path, size_bytes, namespace, MAX_PAYLOAD_BYTES)


def never_looking(path: Path) -> DiskTier:
    """Open a tier that does not look for other processes' blocks by itself."""
    return DiskTier(path, 2 << 20, MODEL, MAX_PAYLOAD_BYTES, retry_seconds=3600)


def read(tier: DiskTier, wanted: Sequence[StoredBlock]) -> list[int]:
    """Read, check every payload, and return the numbers of the blocks that were there."""
    delivered: dict[bytes, bytes | None] = {}
    tier.read(
        [one.hash for one in wanted],
        lambda name, payload: delivered.__setitem__(name, None if payload is None else bytes(payload)),
    )
    found = [one for one in wanted if delivered[one.hash] is not None]
    assert all(delivered[one.hash] == one.payload for one in found)
    return [one.position for one in found]


def files(path: Path) -> list[Path]:
    return sorted(path.glob("0*/*/*.val"))


def rows(path: Path, columns: str = "key") -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for database in sorted(path.glob("0*/cache.db")):
        with closing(sqlite3.connect(database)) as connection:
            found += connection.execute(f"SELECT {columns} FROM Cache").fetchall()
    return found


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
