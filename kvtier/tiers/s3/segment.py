"""Index segments: immutable objects that list new packs and their blocks.

docs/bucket-layout.md gives the bytes. Segments only save time: packs' footers say all that they say.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import xxhash

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3.pack import Pack

MAX_SEGMENT_BYTES = 64 << 20
"""Larger ones are neither written nor read."""

_VERSION = 1
_MAGIC = b"KVTINDX\n"
_HEAD = struct.Struct("<8sHHII4x16s")
_PACK = struct.Struct("<16s16sQII")
_BLOCK = struct.Struct("<16sQI")
_CHECKSUM = struct.Struct("<Q")


def write_segments(packs: Sequence[Pack], namespace: bytes) -> list[bytes]:
    """Write packs into as few index segments as their size allows, mostly one.

    Args:
        packs: What to list.
        namespace: The namespace's id, 16 bytes.

    Returns:
        The segments' bytes.
    """
    segments: list[bytes] = []
    chosen: list[Pack] = []
    size = _HEAD.size + _CHECKSUM.size
    for pack in packs:
        more = _PACK.size + len(pack.hashes) * _BLOCK.size
        if chosen and size + more > MAX_SEGMENT_BYTES:
            segments.append(_write_segment(chosen, namespace))
            chosen, size = [], _HEAD.size + _CHECKSUM.size
        chosen.append(pack)
        size += more
    if chosen:
        segments.append(_write_segment(chosen, namespace))
    return segments


def _write_segment(packs: Sequence[Pack], namespace: bytes) -> bytes:
    blocks = sum(len(pack.hashes) for pack in packs)
    parts = [_HEAD.pack(_MAGIC, _VERSION, 0, len(packs), blocks, namespace)]
    parts.extend(
        _PACK.pack(pack.name, pack.parent, pack.size, pack.position, len(pack.hashes)) for pack in packs
    )
    for pack in packs:
        parts.extend(map(_BLOCK.pack, pack.hashes, pack.offsets, pack.lengths))
    body = b"".join(parts)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def read_segment(data: bytes | bytearray, namespace: bytes, max_block_bytes: int) -> list[Pack]:
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
    packs_end = _HEAD.size + pack_count * _PACK.size
    if (
        magic != _MAGIC
        or (version, flags) != (_VERSION, 0)
        or len(body) != packs_end + block_count * _BLOCK.size
    ):
        raise CorruptBlock("an index segment has an unknown format")
    if owner != namespace:
        raise CorruptBlock(f"an index segment belongs to namespace {owner.hex()}")
    packs: list[Pack] = []
    at = packs_end
    for name, parent, size, position, count in _PACK.iter_unpack(body[_HEAD.size : packs_end]):
        end = at + count * _BLOCK.size
        if count == 0 or end > len(body):
            raise CorruptBlock("an index segment lists fewer blocks than its packs have")
        hashes, offsets, lengths = zip(*_BLOCK.iter_unpack(body[at:end]), strict=True)
        pack = Pack(name, size, parent, position, hashes, array("Q", offsets), array("I", lengths))
        pack.check(max_block_bytes)
        packs.append(pack)
        at = end
    if at != len(body):
        raise CorruptBlock("an index segment lists more blocks than its packs have")
    return packs
