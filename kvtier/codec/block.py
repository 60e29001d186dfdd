"""Encoding and decoding of whole blocks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence

import numpy as np
import xxhash
import zstandard

from kvtier.codec.format import (
    ID_BYTES,
    MAX_ALIGNMENT,
    PLAIN,
    PLANES,
    RAW,
    ZSTD,
    BlockHeader,
    Buffer,
    Section,
    header_bytes,
    layout_codes,
    pack_header,
    read_header,
)
from kvtier.codec.kernels import Bytes
from kvtier.codec.planes import MAX_FRAME_BYTES, Scheme, scheme_for
from kvtier.errors import CorruptBlock
from kvtier.layout import BlockLayout

_WORTH_IT = 0.95
"""What does not shrink below this is stored raw: decoding it would cost more than it saves."""


class _Workspace(threading.local):
    """One thread's zstd contexts and scratch memory, reused from block to block to spare page faults."""

    def __init__(self, scheme: Scheme, rows: int, kv_factor: int, cuts: Sequence[int]) -> None:
        self.plane = np.empty((kv_factor, rows, scheme.plane_row_bytes), np.uint8)
        self.rest = np.empty((rows, kv_factor, scheme.rest_row_bytes), np.uint8)
        plane = self.plane.reshape(-1).data
        self.frames = [plane[start:stop] for start, stop in itertools.pairwise(cuts)]
        self.compress = scheme.compressor()
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_FRAME_BYTES)


class BlockCodec:
    """Encodes and decodes the blocks of one layout and namespace, without loss for every bit pattern.

    Immutable and thread-safe. The heavy parts (splitting, zstd, merging) run without the GIL.

    Attributes:
        layout: The layout of the raw blocks.
        namespace: Id of the namespace that is written into, and demanded of, every block.
        max_encoded_bytes: No encoded block is longer; anything longer is corrupt.
    """

    def __init__(self, layout: BlockLayout, namespace: bytes) -> None:
        """Prepare for blocks of one layout.

        Args:
            layout: Arrangement of the raw blocks.
            namespace: Namespace id, 16 bytes.

        Raises:
            LayoutError: The format cannot express the layout.
            ValueError: The namespace id is not 16 bytes long.
        """
        if len(namespace) != ID_BYTES:
            raise ValueError(f"a namespace id has {ID_BYTES} bytes, got {len(namespace)}")
        layout_codes(layout)
        self.layout = layout
        self.namespace = bytes(namespace)
        self._alignment = _alignment(layout.block_bytes)
        self.max_encoded_bytes = self._aligned(header_bytes(1)) + layout.block_bytes
        self._scheme = scheme_for(layout)
        rows = layout.shards * layout.layers
        self._raw_shape = (rows, layout.kv_factor, layout.block_bytes // (rows * layout.kv_factor))
        self._rest_shape = (rows, layout.kv_factor, self._scheme.rest_row_bytes)
        cuts = _frame_cuts(rows * self._scheme.plane_row_bytes, layout.kv_factor)
        self._workspace = _Workspace(self._scheme, rows, layout.kv_factor, cuts)
        # What the table of sections of a block of this layout must say, by codec: encodings and raw lengths.
        frames = [(ZSTD, stop - start) for start, stop in itertools.pairwise(cuts)]
        rest_bytes = rows * layout.kv_factor * self._scheme.rest_row_bytes
        self._expected = {
            RAW: [(PLAIN, layout.block_bytes)],
            PLANES: frames + [(PLAIN, rest_bytes)] * (rest_bytes > 0),
        }

    def encode(self, block_hash: bytes, raw: Buffer) -> memoryview:
        """Encode one block.

        Args:
            block_hash: The block's identity, 16 bytes.
            raw: Its bytes, exactly `layout.block_bytes`.

        Returns:
            The encoded block, read-only, in memory of its own.

        Raises:
            ValueError: The hash or the block has the wrong length.
        """
        if len(block_hash) != ID_BYTES:
            raise ValueError(f"a block hash has {ID_BYTES} bytes, got {len(block_hash)}")
        source = self._block_array(raw)
        work = self._workspace
        self._scheme.split(source, work.plane, work.rest)
        frames = self._compress_plane(work)
        if frames is None:
            return self._assemble(RAW, block_hash, [], source.reshape(-1))
        return self._assemble(PLANES, block_hash, frames, work.rest.reshape(-1))

    def decode(self, block_hash: bytes, encoded: Buffer, out: bytearray | memoryview) -> None:
        """Verify an encoded block and decode it into `out`.

        Args:
            block_hash: The identity that the block must have, 16 bytes.
            encoded: The encoded block; any bytes at all are safe.
            out: Writable room of exactly `layout.block_bytes`. After `CorruptBlock` it may hold garbage.

        Raises:
            CorruptBlock: The bytes are not, to the last bit, a block of this hash, namespace and layout.
            ValueError: `out` is read-only or has the wrong length.
        """
        target = self._block_array(out)
        if not target.flags.writeable:
            raise ValueError("the room for the decoded block is read-only")
        view = memoryview(encoded).cast("B").toreadonly()
        if len(view) > self.max_encoded_bytes:
            raise CorruptBlock(f"{len(view)} bytes are more than any block of this layout")
        header = read_header(view)
        self._check_identity(header, block_hash, len(view))
        end = header_bytes(len(header.sections))
        work = self._workspace
        rest: Bytes = work.rest
        for index, section in enumerate(header.sections):
            stored = _verified(view, end, section)
            end = section.offset + section.stored_bytes
            if section.encoding == ZSTD:
                _decompress(work.decompressor, stored, work.frames[index])
            elif header.codec == RAW:
                np.copyto(target, np.frombuffer(stored, np.uint8).reshape(self._raw_shape))
                return
            else:
                rest = np.frombuffer(stored, np.uint8).reshape(self._rest_shape)
        self._scheme.merge(target, work.plane, rest)

    def _block_array(self, buffer: Buffer) -> Bytes:
        array = np.frombuffer(buffer, np.uint8)
        if array.size != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, got {array.size}")
        return array.reshape(self._raw_shape)

    def _aligned(self, offset: int) -> int:
        return -(-offset // self._alignment) * self._alignment

    def _compress_plane(self, work: _Workspace) -> list[bytes] | None:
        """Compress the plane; None where it does not pay, going by the first frame or by the whole."""
        first, *others = work.frames
        frames = [work.compress(first)]
        if len(frames[0]) > _WORTH_IT * len(first):
            return None
        frames += map(work.compress, others)
        sections = len(frames) + (work.rest.size > 0)
        stored_bytes = header_bytes(sections) + sum(map(len, frames)) + work.rest.size
        return frames if stored_bytes <= _WORTH_IT * self.layout.block_bytes else None

    def _assemble(self, codec: int, block_hash: bytes, frames: Sequence[bytes], plain: Bytes) -> memoryview:
        start = offset = header_bytes(len(frames) + (plain.size > 0))
        sections: list[Section] = []
        for frame, (_, raw_bytes) in zip(frames, self._expected[codec], strict=False):
            sections.append(Section(ZSTD, offset, len(frame), raw_bytes, xxhash.xxh3_64_intdigest(frame)))
            offset += len(frame)
        frames_end = offset
        if plain.size:
            offset = self._aligned(offset)
            sections.append(
                Section(PLAIN, offset, plain.size, plain.size, xxhash.xxh3_64_intdigest(plain.data))
            )
            offset += plain.size
        encoded = np.empty(offset, np.uint8)
        view = encoded.data
        view[:start] = pack_header(
            BlockHeader(codec, self.layout, block_hash, self.namespace, offset, tuple(sections))
        )
        for frame, section in zip(frames, sections, strict=False):
            view[section.offset : section.offset + section.stored_bytes] = frame
        encoded[frames_end : offset - plain.size] = 0
        encoded[offset - plain.size :] = plain
        return view.toreadonly()

    def _check_identity(self, header: BlockHeader, block_hash: bytes, length: int) -> None:
        if header.total_bytes != length:
            raise CorruptBlock(f"{length} bytes where the header says {header.total_bytes}")
        if header.namespace != self.namespace:
            raise CorruptBlock(f"block of another namespace: {header.namespace.hex()}")
        if header.layout != self.layout:
            raise CorruptBlock(f"block of another layout: {header.layout}")
        if header.block_hash != block_hash:
            raise CorruptBlock(f"another block: {header.block_hash.hex()} instead of {block_hash.hex()}")
        found = [(section.encoding, section.raw_bytes) for section in header.sections]
        if found != self._expected[header.codec]:
            raise CorruptBlock("the sections are not those of this layout")


def check_block(encoded: Buffer, block_hash: bytes, namespace: bytes) -> None:
    """Check an encoded block of whatever layout, without decompressing it: what it is, and all checksums.

    Args:
        encoded: The encoded block; any bytes at all are safe.
        block_hash: The identity that the block must have, 16 bytes.
        namespace: The id of the namespace that it must belong to, 16 bytes.

    Raises:
        CorruptBlock: The bytes are not those that were written for this block.
    """
    view = memoryview(encoded).cast("B").toreadonly()
    header = read_header(view)
    if (header.total_bytes, header.block_hash, header.namespace) != (len(view), block_hash, namespace):
        raise CorruptBlock(
            f"{len(view)} bytes with the header of block {header.block_hash.hex()} of {header.total_bytes} "
            f"bytes in namespace {header.namespace.hex()}"
        )
    end = header_bytes(len(header.sections))
    for section in header.sections:
        _verified(view, end, section)
        end = section.offset + section.stored_bytes


def _alignment(block_bytes: int) -> int:
    """The largest power of two that costs at most half a percent of a block, but 64 to 4096."""
    alignment = MAX_ALIGNMENT
    while alignment > 64 and alignment * 200 > block_bytes:
        alignment //= 2
    return alignment


def _frame_cuts(part_bytes: int, parts: int) -> list[int]:
    """Where the plane is cut into frames: each part (K, V) into equal ones, the last maybe shorter."""
    frames = -(-part_bytes // MAX_FRAME_BYTES)
    step = -(-part_bytes // frames)
    return [part * part_bytes + start for part in range(parts) for start in range(0, part_bytes, step)] + [
        parts * part_bytes
    ]


def _verified(view: memoryview, end: int, section: Section) -> memoryview:
    """Return the stored bytes of a section when they, and the gap since `end`, are as they were written."""
    if view[end : section.offset].tobytes() != bytes(section.offset - end):
        raise CorruptBlock(f"the gap before byte {section.offset} is not zero")
    stored = view[section.offset : section.offset + section.stored_bytes]
    if xxhash.xxh3_64_intdigest(stored) != section.checksum:
        raise CorruptBlock(f"checksum of the section at byte {section.offset} does not match")
    return stored


def _decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, out: memoryview) -> None:
    try:
        content_bytes = zstandard.frame_content_size(frame)
        if content_bytes == len(out) == decompressor.stream_reader(frame).readinto(out):
            return
    except zstandard.ZstdError as error:
        raise CorruptBlock(f"not a zstd frame: {error}") from error
    raise CorruptBlock(f"a zstd frame of {content_bytes} bytes instead of {len(out)}")
