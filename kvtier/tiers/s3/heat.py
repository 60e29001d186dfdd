"""Heat: which blocks were used, how often and when, in small summaries that nodes leave in the bucket.

Only the last block of a hit is noted: that it was used means that all blocks before it were. A summary says
how long before it was written each block was used, and the server knows when that was, so nodes' clocks do
not matter. docs/bucket-layout.md gives the bytes.
"""

from __future__ import annotations

import heapq
import logging
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from kvtier._logging import log_once
from kvtier.errors import CorruptBlock
from kvtier.tiers.s3.bucket import Bucket, ListedObject, ObjectMissing
from kvtier.tiers.s3.keys import Keys

_logger = logging.getLogger(__name__)

MAX_NOTED = 65_536
"""Blocks that one node notes between two summaries; what is more is not noted."""
MAX_FOLDED = 262_144
"""Blocks in a summary at most; the coldest are left out."""
HALF_LIFE_SECONDS = 86_400.0
"""After so long, a use counts half."""

_ROW = np.dtype([("hash", "V16"), ("count", "<f4"), ("age", "<u4")])
_VERSION = 1
_MAGIC = b"KVTHEAT\n"
_HEAD = struct.Struct("<8sHHI16s")
_CHECKSUM = struct.Struct("<Q")
MAX_HEAT_BYTES = _HEAD.size + MAX_FOLDED * _ROW.itemsize + _CHECKSUM.size
_MAX_COUNT = 1e12
_MAX_AGE = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Use:
    """How a block was used.

    Attributes:
        count: How often; each use counts half for every `HALF_LIFE_SECONDS` that it lay before `last`.
        last: When it was last, in seconds.
    """

    count: float
    last: float

    def joined(self, other: Use) -> Use:
        """Return both together."""
        early, late = sorted((self, other), key=lambda use: use.last)
        return Use(late.count + early.count_at(late.last), late.last)

    def count_at(self, now: float) -> float:
        """Return what the count is worth at a later time."""
        return float(self.count * 0.5 ** (max(0.0, now - self.last) / HALF_LIFE_SECONDS))


class HeatLog:
    """What this node has used since its last summary. Thread-safe; noting takes well under a microsecond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Make an empty log; `clock` gives seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._noted: dict[bytes, list[float]] = {}

    def note(self, block_hash: bytes) -> None:
        """Note the last block of a hit."""
        with self._lock:
            entry = self._noted.get(block_hash)
            if entry is not None:
                entry[0] += 1.0
                entry[1] = self._clock()
            elif len(self._noted) < MAX_NOTED:
                self._noted[block_hash] = [1.0, self._clock()]

    def write(self, bucket: Bucket, keys: Keys, namespace: bytes) -> bool:
        """Write a summary of what was noted, and forget it; False if there was nothing.

        Raises:
            TierError: The bucket does not answer or refuses; what was noted meanwhile is lost.
        """
        with self._lock:
            noted, self._noted = self._noted, {}
        if noted:
            uses = {block: Use(count, last) for block, (count, last) in noted.items()}
            bucket.put(keys.new_heat(time.time_ns()), write_heat(uses, self._clock(), namespace))
        return bool(noted)


def write_heat(uses: Mapping[bytes, Use], now: float, namespace: bytes) -> bytes:
    """Return the bytes of a summary, `now` on the clock of the uses; of too many blocks the hottest."""
    chosen: Iterable[tuple[bytes, Use]] = uses.items()
    if len(uses) > MAX_FOLDED:
        chosen = heapq.nlargest(MAX_FOLDED, chosen, key=lambda entry: entry[1].count_at(now))
    rows = np.array(
        [
            (block, min(use.count, _MAX_COUNT), min(max(0, int(now - use.last)), _MAX_AGE))
            for block, use in chosen
        ],
        _ROW,
    )
    body = _HEAD.pack(_MAGIC, _VERSION, 0, len(rows), namespace) + rows.tobytes()
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def read_heat(data: bytes | bytearray, written: float, namespace: bytes) -> dict[bytes, Use]:
    """Read a summary that was written at `written`.

    Raises:
        CorruptBlock: Anything does not fit; also a summary of another namespace or version.
    """
    if len(data) < _HEAD.size + _CHECKSUM.size:
        raise CorruptBlock(f"a summary of accesses of {len(data)} bytes is too short")
    body = memoryview(data)[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
        raise CorruptBlock("a summary of accesses has a wrong checksum")
    magic, version, flags, count, owner = _HEAD.unpack_from(body)
    if (
        magic != _MAGIC
        or (version, flags) != (_VERSION, 0)
        or len(body) != _HEAD.size + count * _ROW.itemsize
        or owner != namespace
    ):
        raise CorruptBlock("a summary of accesses has an unknown format, or belongs to another namespace")
    rows: np.ndarray[Any, Any] = np.frombuffer(body[_HEAD.size :], _ROW)
    if not ((rows["count"] > 0) & (rows["count"] <= _MAX_COUNT)).all():
        raise CorruptBlock("a summary of accesses has an impossible count")
    return {
        block.tobytes(): Use(float(uses), written - age)
        for block, uses, age in zip(rows["hash"], rows["count"].tolist(), rows["age"].tolist(), strict=True)
    }


def load_heat(bucket: Bucket, keys: Keys, namespace: bytes) -> tuple[dict[bytes, Use], list[str]]:
    """Read all summaries of a namespace.

    Returns:
        Each block's use, in seconds since 1970 by the server's clock, and the keys of the summaries.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    uses: dict[bytes, Use] = {}
    seen: list[str] = []
    for item in list(bucket.list(keys.heat)):
        if not keys.is_heat(item.key):
            continue
        seen.append(item.key)
        for block, use in _load(bucket, item, namespace).items():
            known = uses.get(block)
            uses[block] = use if known is None else known.joined(use)
    return uses, seen


def fold_heat(
    bucket: Bucket, keys: Keys, namespace: bytes, uses: Mapping[bytes, Use], seen: list[str]
) -> None:
    """Write one summary in place of those that were `seen`, and delete these.

    Whoever dies in between leaves uses that count twice until they have cooled.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    if len(seen) < 2:
        return
    if uses:
        bucket.put(keys.new_heat(time.time_ns()), write_heat(uses, bucket.server_time(), namespace))
    for key in seen:
        bucket.delete(key)


def _load(bucket: Bucket, item: ListedObject, namespace: bytes) -> dict[bytes, Use]:
    try:
        if not 0 < item.size <= MAX_HEAT_BYTES:
            raise CorruptBlock(f"a summary of accesses of {item.size} bytes")
        data = bytearray(item.size)
        bucket.get_range(item.key, 0, memoryview(data))
        return read_heat(data, item.modified, namespace)
    except ObjectMissing:
        # Somebody has folded it meanwhile.
        return {}
    except CorruptBlock as error:
        log_once(_logger, "heat", "%s: %s; it is left out", item.key, error)
        return {}
