"""Packs: immutable objects of consecutive encoded blocks of one chain, with a footer that lists them.

docs/bucket-layout.md gives the bytes. A pack says all about itself, so the index can be rebuilt from packs.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from kvtier.errors import CorruptBlock
from kvtier.hashing import HASH_BYTES
from kvtier.layout import BlockLayout
from kvtier.tiers.base import StoredBlock

MAX_PACK_BLOCKS = 1024
PACK_TOKENS = 1024
PACK_BYTES = 96 << 20
"""1,024 tokens of an 8B model in bf16; a PUT for each 16 MiB would cost half of what computing them does."""
EXPECTED_RATIO = 1.4
"""Compression that the size of a pack is planned with; a little below what bf16 reaches (1.5)."""

_VERSION = 1
_HEAD = struct.Struct("<8sH6x")
_HEAD_MAGIC = b"KVTPACK\n"
PACK_HEAD_BYTES = _HEAD.size
_FOOTER = struct.Struct("<8sHHI16s")
_FOOTER_MAGIC = b"KVTFOOT\n"
_RECORD = struct.Struct("<16s16sIQI")
_TRAILER = struct.Struct("<QI4s")
_TRAILER_MAGIC = b"KVTE"

MAX_TAIL_BYTES = _FOOTER.size + MAX_PACK_BLOCKS * _RECORD.size + _TRAILER.size
"""No footer with its trailer is longer: reading this much of a pack's end always gets all of it."""

_MAX_POSITION = 1 << 32


@dataclass(frozen=True, slots=True)
class Pack:
    """What the index knows about one pack.

    Attributes:
        name: 16 bytes; the object's name is their hexadecimal form.
        size: Bytes of the object.
        parent: Hash of the block before the first one, or the chain's root.
        position: Place of the first block in its chain.
        hashes: The blocks' hashes, in the chain's order.
        offsets: Where each block's payload starts in the object, uint64.
        lengths: Bytes of each payload, uint32.
    """

    name: bytes
    size: int
    parent: bytes
    position: int
    hashes: tuple[bytes, ...]
    offsets: array[int]
    lengths: array[int]

    def check(self, max_block_bytes: int) -> None:
        """Check that the numbers describe a possible pack, before anything is allocated or requested.

        Raises:
            CorruptBlock: Too few or too many blocks, one that is empty, too long, outside the object or
                overlaps another.
        """
        if not 1 <= len(self.hashes) <= MAX_PACK_BLOCKS or self.position + len(self.hashes) > _MAX_POSITION:
            raise CorruptBlock(
                f"a pack of {len(self.hashes)} blocks from position {self.position} on is impossible"
            )
        end = _HEAD.size
        for offset, length in zip(self.offsets, self.lengths, strict=True):
            if offset < end or not 1 <= length <= max_block_bytes:
                raise CorruptBlock(f"a pack lists an impossible block of {length} bytes at {offset}")
            end = offset + length
        if end > self.size:
            raise CorruptBlock(f"a pack of {self.size} bytes lists blocks up to {end}")


def window_blocks(layout: BlockLayout) -> int:
    """Return how many blocks a whole pack holds: a power of two, at most 1,024 tokens and about 96 MiB.

    Packs are cut where a block's position is a multiple of it, so that replicas cut alike.
    """
    window = 1
    while (
        window * 2 * layout.tokens_per_block <= PACK_TOKENS
        and window * 2 * layout.block_bytes / EXPECTED_RATIO <= PACK_BYTES
    ):
        window *= 2
    return window


def window_bytes(layout: BlockLayout) -> int:
    """Return about how many bytes a whole pack has."""
    return int(window_blocks(layout) * layout.block_bytes / EXPECTED_RATIO)


def pack_name(hashes: Sequence[bytes], salt: bytes = b"") -> bytes:
    """Return a pack's 16-byte name: BLAKE2b-128 of its block hashes.

    Args:
        hashes: Block hashes in the chain's order.
        salt: Random bytes when the plain name is taken by an object that cannot be used.
    """
    return hashlib.blake2b(b"".join(hashes), digest_size=HASH_BYTES, salt=salt).digest()


def write_pack(blocks: Sequence[StoredBlock], namespace: bytes, salt: bytes = b"") -> tuple[bytes, Pack]:
    """Lay out consecutive blocks of one chain as a pack.

    Args:
        blocks: 1 to `MAX_PACK_BLOCKS` blocks, each one's parent the one before.
        namespace: The namespace's id, 16 bytes.
        salt: See `pack_name`.

    Returns:
        The object's bytes and its description.
    """
    offsets, lengths = array("Q"), array("I")
    offset = _HEAD.size
    for block in blocks:
        length = len(block.payload)
        offsets.append(offset)
        lengths.append(length)
        offset += length
    footer = _FOOTER.pack(_FOOTER_MAGIC, _VERSION, 0, len(blocks), namespace) + b"".join(
        _RECORD.pack(block.hash, block.parent, block.position, place, length)
        for block, place, length in zip(blocks, offsets, lengths, strict=True)
    )
    trailer = _TRAILER.pack(xxhash.xxh3_64_intdigest(footer), len(footer), _TRAILER_MAGIC)
    head = _HEAD.pack(_HEAD_MAGIC, _VERSION)
    body = b"".join([head, *(block.payload for block in blocks), footer, trailer])
    hashes = tuple(block.hash for block in blocks)
    first = blocks[0]
    pack = Pack(pack_name(hashes, salt), len(body), first.parent, first.position, hashes, offsets, lengths)
    return body, pack


def read_footer(tail: bytes, size: int, name: bytes, namespace: bytes, max_block_bytes: int) -> Pack:
    """Read the footer out of the last bytes of a pack.

    Args:
        tail: The last `min(size, MAX_TAIL_BYTES)` bytes of the object, or more.
        size: Bytes of the object.
        name: The pack's name, from its key.
        namespace: The namespace's id that the pack must carry.
        max_block_bytes: No payload is longer.

    Raises:
        CorruptBlock: Anything does not fit; also a pack of another namespace or version.
    """
    if len(tail) < _TRAILER.size + _FOOTER.size or size < len(tail):
        raise CorruptBlock(f"pack {name.hex()} is too short for a footer")
    checksum, length, magic = _TRAILER.unpack_from(tail, len(tail) - _TRAILER.size)
    start = len(tail) - _TRAILER.size - length
    if magic != _TRAILER_MAGIC or length < _FOOTER.size or start < 0:
        raise CorruptBlock(f"pack {name.hex()} does not end with a footer")
    footer = memoryview(tail)[start : start + length]
    if xxhash.xxh3_64_intdigest(footer) != checksum:
        raise CorruptBlock(f"the footer of pack {name.hex()} has a wrong checksum")
    magic, version, flags, count, owner = _FOOTER.unpack_from(footer)
    if (
        magic != _FOOTER_MAGIC
        or (version, flags) != (_VERSION, 0)
        or length != _FOOTER.size + count * _RECORD.size
    ):
        raise CorruptBlock(f"the footer of pack {name.hex()} has an unknown format")
    if owner != namespace:
        raise CorruptBlock(f"pack {name.hex()} belongs to namespace {owner.hex()}")
    if count == 0:
        raise CorruptBlock(f"pack {name.hex()} lists no blocks")
    hashes, parents, positions, offsets, lengths = zip(
        *_RECORD.iter_unpack(footer[_FOOTER.size :]), strict=True
    )
    if parents[1:] != hashes[:-1] or positions != tuple(range(positions[0], positions[0] + count)):
        raise CorruptBlock(f"the blocks of pack {name.hex()} are not consecutive")
    payloads_end = size - _TRAILER.size - length
    if offsets[-1] + lengths[-1] > payloads_end:
        raise CorruptBlock(
            f"pack {name.hex()} lists blocks up to {offsets[-1] + lengths[-1]} of {payloads_end} bytes"
        )
    pack = Pack(name, size, parents[0], positions[0], hashes, array("Q", offsets), array("I", lengths))
    pack.check(max_block_bytes)
    return pack
