"""Index segments: immutable objects that list new packs and their blocks.

docs/bucket-layout.md gives the bytes. Segments only save time: packs' footers say all that they say.
"""

from __future__ import annotations

import struct

import numpy as np
import xxhash

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3.pack_table import BLOCK_ROW, PACK_ROW, PackTable

MAX_SEGMENT_BYTES = 64 << 20
"""Larger ones are neither written nor read."""

_VERSION = 1
_MAGIC = b"KVTINDX\n"
_HEAD = struct.Struct("<8sHHII4x16s")
_CHECKSUM = struct.Struct("<Q")


def write_segments(packs: PackTable, namespace: bytes) -> list[bytes]:
    """Write packs into as few index segments as their size allows, mostly one.

    Args:
        packs: What to list.
        namespace: The namespace's id, 16 bytes.

    Returns:
        The segments' bytes.
    """
    segments: list[bytes] = []
    starts = packs.starts().tolist()
    first = 0
    for last in range(1, len(packs) + 1):
        more = last < len(packs)
        rows = starts[last + 1 if more else last] - starts[first]
        size = (
            _HEAD.size + _CHECKSUM.size + (last + 1 - first) * PACK_ROW.itemsize + rows * BLOCK_ROW.itemsize
        )
        if not more or size > MAX_SEGMENT_BYTES:
            chosen = PackTable(packs.packs[first:last], packs.blocks[starts[first] : starts[last]])
            segments.append(_write_segment(chosen, namespace))
            first = last
    return segments


def _write_segment(packs: PackTable, namespace: bytes) -> bytes:
    head = _HEAD.pack(_MAGIC, _VERSION, 0, len(packs), len(packs.blocks), namespace)
    body = head + packs.packs.tobytes() + packs.blocks.tobytes()
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def read_segment(data: bytes | bytearray, namespace: bytes, max_block_bytes: int) -> PackTable:
    """Read an index segment.

    Args:
        data: The whole object.
        namespace: The namespace's id that it must carry.
        max_block_bytes: No payload is longer.

    Raises:
        CorruptBlock: Anything does not fit; also a segment of another namespace or version.
    """
    if len(data) < _HEAD.size + _CHECKSUM.size:
        raise CorruptBlock(f"an index segment of {len(data)} bytes is too short")
    view = memoryview(data)
    body = view[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(view[-_CHECKSUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
        raise CorruptBlock("an index segment has a wrong checksum")
    magic, version, flags, pack_count, block_count, owner = _HEAD.unpack_from(body)
    packs_end = _HEAD.size + pack_count * PACK_ROW.itemsize
    if (
        magic != _MAGIC
        or (version, flags) != (_VERSION, 0)
        or len(body) != packs_end + block_count * BLOCK_ROW.itemsize
    ):
        raise CorruptBlock("an index segment has an unknown format")
    if owner != namespace:
        raise CorruptBlock(f"an index segment belongs to namespace {owner.hex()}")
    packs = PackTable(
        np.frombuffer(body[_HEAD.size : packs_end], PACK_ROW), np.frombuffer(body[packs_end:], BLOCK_ROW)
    )
    packs.check(max_block_bytes)
    return packs
