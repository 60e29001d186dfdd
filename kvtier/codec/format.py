"""The byte format of an encoded block: its header and table of sections. Specified in `docs/format.md`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import xxhash

from kvtier.errors import CorruptBlock, LayoutError
from kvtier.layout import BlockLayout

Buffer = bytes | bytearray | memoryview
Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

MAGIC = b"KVTBLOCK"
VERSION = 1

RAW, PLANES, NIBBLES = 0, 1, 2
"""Codecs of a block: its bytes as they are; split into a compressed plane and a plain rest; or into the
nibbles of exponents below their channel's largest one, compressed, and a plain rest."""

PLAIN, ZSTD, SPLIT = 0, 1, 2
"""Encodings of a section: bytes as they are; one zstd frame; or nibbles, of which the lower two bits stand
there as they are and the upper two in one zstd frame."""

MAX_ALIGNMENT = 4096
"""Plain sections start at a multiple of a power of two up to this; the gap before them is zero."""

WORTH_IT = 0.95
"""What does not shrink below this is stored raw: decoding it would cost more than it saves."""

ID_BYTES = 16
"""Bytes of a block hash and of a namespace id."""

_DTYPE_CODES = {
    "bfloat16": 1,
    "float16": 2,
    "float32": 3,
    "float8_e4m3fn": 4,
    "float8_e5m2": 5,
    "int8": 6,
    "uint8": 7,
}
_KIND_CODES = {"flat": 0, "groups": 1}
_DTYPES = {code: name for name, code in _DTYPE_CODES.items()}
_KINDS = {code: name for name, code in _KIND_CODES.items()}

# magic, version, codec, dtype, kind, padding, head_dim, tokens_per_block, shards, layers, kv_factor,
# row_elements, number of sections, raw length, total length, block hash, namespace
_FIXED = struct.Struct("<8sHBBBBHIIIIIIII16s16s")
_SECTION = struct.Struct("<IIIIQ")
_CHECKSUM = struct.Struct("<Q")

FIXED_BYTES, SECTION_BYTES = _FIXED.size, _SECTION.size
"""Lengths of a header's first part and of an entry of its table."""

TOTAL_BYTES_AT = 44
"""Where in a header the total length stands; block hash and namespace follow, and end the first part."""


class Section(NamedTuple):
    """One entry of the table of sections.

    Attributes:
        encoding: `PLAIN`, `ZSTD` or `SPLIT`.
        offset: Where the section starts, in bytes from the start of the encoded block.
        stored_bytes: Its length there.
        raw_bytes: Its length when decoded.
        checksum: XXH3-64 of the stored bytes.
    """

    encoding: int
    offset: int
    stored_bytes: int
    raw_bytes: int
    checksum: int


class Expected(NamedTuple):
    """What the table of sections must say of one of them.

    Attributes:
        encodings: Those that it may have.
        raw_bytes: Its length when decoded; None: any.
    """

    encodings: tuple[int, ...]
    raw_bytes: int | None


class Piece(NamedTuple):
    """What becomes a section.

    Attributes:
        encoding: `PLAIN`, `ZSTD` or `SPLIT`.
        data: The stored bytes.
        raw_bytes: Their length when decoded.
        aligned: Whether it starts at a multiple of the block's alignment; plain ones only.
    """

    encoding: int
    data: Buffer
    raw_bytes: int
    aligned: bool = False


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What an encoded block says about itself.

    Attributes:
        codec: `RAW`, `PLANES` or `NIBBLES`.
        layout: dtype and geometry of the raw block; `layout.block_bytes` is its length, and
            `layout.head_dim` the size of the heads as which it was encoded.
        block_hash: Identity of the block, 16 bytes.
        namespace: Id of the namespace that it belongs to, 16 bytes.
        total_bytes: Length of the whole encoded block.
        sections: The table of sections, in the order of their offsets.
    """

    codec: int
    layout: BlockLayout
    block_hash: bytes
    namespace: bytes
    total_bytes: int
    sections: tuple[Section, ...]


def header_bytes(sections: int) -> int:
    """Return the length of a header whose table has that many sections."""
    return _FIXED.size + sections * _SECTION.size + _CHECKSUM.size


def layout_codes(layout: BlockLayout) -> tuple[int, int]:
    """Return the codes of a layout's dtype and kind.

    Raises:
        LayoutError: The format has no code for them.
    """
    if layout.dtype not in _DTYPE_CODES or layout.kind not in _KIND_CODES:
        raise LayoutError(f"the block format has no code for {layout.kind!r} blocks of {layout.dtype!r}")
    return _DTYPE_CODES[layout.dtype], _KIND_CODES[layout.kind]


def pack_fixed(
    codec: int, layout: BlockLayout, sections: int, total_bytes: int, block_hash: bytes, namespace: bytes
) -> bytes:
    """Return the first part of a header, `FIXED_BYTES`; see `BlockHeader`."""
    dtype, kind = layout_codes(layout)
    return _FIXED.pack(
        MAGIC,
        VERSION,
        codec,
        dtype,
        kind,
        0,
        layout.head_dim if codec == NIBBLES else 0,
        layout.tokens_per_block,
        layout.shards,
        layout.layers,
        layout.kv_factor,
        layout.row_elements,
        sections,
        layout.block_bytes,
        total_bytes,
        block_hash,
        namespace,
    )


def pack_header(header: BlockHeader) -> bytes:
    """Return the bytes of a header, its checksum included."""
    fixed = pack_fixed(
        header.codec,
        header.layout,
        len(header.sections),
        header.total_bytes,
        header.block_hash,
        header.namespace,
    )
    body = fixed + b"".join(_SECTION.pack(*section) for section in header.sections)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def read_header(encoded: Buffer) -> BlockHeader:
    """Read and check the header of an encoded block.

    Args:
        encoded: The encoded block, or at least its whole header; any bytes at all are safe.

    Returns:
        The header. Its sections lie one after the other between header and `total_bytes`, with gaps only
        before plain sections; whether their bytes are there and intact is for `BlockCodec.decode` to check.

    Raises:
        CorruptBlock: Not an encoded block, of an unknown version, cut off, or altered.
    """
    view = memoryview(encoded).cast("B")
    if len(view) < _FIXED.size:
        raise CorruptBlock(f"{len(view)} bytes are too short for a block header")
    (
        magic,
        version,
        codec,
        dtype,
        kind,
        padding,
        head_dim,
        tokens_per_block,
        shards,
        layers,
        kv_factor,
        row_elements,
        count,
        raw_bytes,
        total_bytes,
        block_hash,
        namespace,
    ) = _FIXED.unpack_from(view)
    if magic != MAGIC:
        raise CorruptBlock("not an encoded block: wrong magic")
    if version != VERSION:
        raise CorruptBlock(f"block format version {version} is unknown")
    end = header_bytes(count)
    if len(view) < end:
        raise CorruptBlock(f"{len(view)} bytes are too short for a header with {count} sections")
    table_end = end - _CHECKSUM.size
    if _CHECKSUM.unpack_from(view, table_end)[0] != xxhash.xxh3_64_intdigest(view[:table_end]):
        raise CorruptBlock("checksum of the block header does not match")
    if padding or codec not in (RAW, PLANES, NIBBLES) or dtype not in _DTYPES or kind not in _KINDS:
        raise CorruptBlock(f"unknown codec {codec}, dtype {dtype} or kind {kind}")
    if bool(head_dim) != (codec == NIBBLES):
        raise CorruptBlock(f"heads of {head_dim} elements in a block of codec {codec}")
    layout = _layout(
        _DTYPES[dtype],
        tokens_per_block,
        layers,
        kv_factor,
        row_elements,
        shards,
        _KINDS[kind],
        head_dim,
    )
    if raw_bytes != layout.block_bytes:
        raise CorruptBlock(f"raw length {raw_bytes} is not the {layout.block_bytes} of the layout")
    table = view[_FIXED.size : table_end]
    sections = tuple(map(Section._make, _SECTION.iter_unpack(table)))
    _check_sections(sections, end, total_bytes)
    return BlockHeader(codec, layout, block_hash, namespace, total_bytes, sections)


@lru_cache(maxsize=16)
def _layout(
    dtype: str, tokens: int, layers: int, parts: int, elements: int, shards: int, kind: str, head_dim: int
) -> BlockLayout:
    try:
        return BlockLayout(dtype, tokens, layers, parts, elements, shards, kind, head_dim)
    except LayoutError as error:
        raise CorruptBlock(f"impossible layout: {error}") from error


def _check_sections(sections: Sequence[Section], start: int, total_bytes: int) -> None:
    end = start
    for encoding, offset, stored_bytes, raw_bytes, _ in sections:
        if encoding == PLAIN:
            fits = 0 <= offset - end < MAX_ALIGNMENT and stored_bytes == raw_bytes
        else:
            fits = encoding in (ZSTD, SPLIT) and offset == end
        if not fits:
            raise CorruptBlock("the table of sections is inconsistent")
        end = offset + stored_bytes
    if end != total_bytes:
        raise CorruptBlock(f"sections end at {end}, the block at {total_bytes}")
