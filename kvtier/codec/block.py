"""Encoding and decoding of whole blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kvtier.codec.format import (
    ID_BYTES,
    MAX_ALIGNMENT,
    NIBBLES,
    PLAIN,
    PLANES,
    RAW,
    TOTAL_BYTES_AT,
    WORTH_IT,
    BlockHeader,
    Buffer,
    Bytes,
    Expected,
    Piece,
    Section,
    header_bytes,
    layout_codes,
    pack_fixed,
    pack_header,
    read_header,
)
from kvtier.codec.nibbles import nibble_shape
from kvtier.codec.slots import PlaneSlots, RawSlots, SlotForm
from kvtier.codec.source import StoredFile
from kvtier.errors import CorruptBlock, SlotMisfit
from kvtier.layout import BlockLayout

if TYPE_CHECKING:
    from kvtier.codec.native import NativeDecoder
    from kvtier.codec.nibble_codec import NibbleCodec

ALIGNMENT = 64
"""The rest begins at a multiple: copies are as fast as between whole pages, and next to nothing is lost."""


class BlockCodec:
    """Encodes and decodes the blocks of one layout and namespace, without loss for every bit pattern.

    What is stored does not depend on the form of the slots: whatever is stored can be decoded into slots of
    any form, as far as the block fits there.

    Immutable and thread-safe. The heavy parts (splitting, zstd, merging) run without the GIL.

    Attributes:
        layout: The layout of the raw blocks.
        namespace: Id of the namespace that is written into, and demanded of, every block.
        form: How blocks lie in slots, from which they are encoded and into which they are decoded.
        max_encoded_bytes: No encoded block is longer; anything longer is corrupt.
    """

    def __init__(self, layout: BlockLayout, namespace: bytes, form: SlotForm | None = None) -> None:
        """Prepare for blocks of one layout.

        Args:
            layout: Arrangement of the raw blocks.
            namespace: Namespace id, 16 bytes.
            form: Form of the slots; raw by default.

        Raises:
            LayoutError: The format cannot express the layout.
            ValueError: The namespace id is not 16 bytes long.
        """
        if len(namespace) != ID_BYTES:
            raise ValueError(f"a namespace id has {ID_BYTES} bytes, got {len(namespace)}")
        layout_codes(layout)
        self.layout = layout
        self.namespace = bytes(namespace)
        self.form = form if form is not None else RawSlots(layout)
        self._planes = self.form if isinstance(self.form, PlaneSlots) else None
        self.max_encoded_bytes = MAX_ALIGNMENT + layout.block_bytes
        # Not before a codec is wanted: an engine whose blocks an agent encodes and decodes needs no numba.
        from kvtier.codec import native
        from kvtier.codec.byte_codec import ByteCodec
        from kvtier.codec.nibble_codec import NibbleCodec

        self._bytes = ByteCodec(layout)
        # Blocks name the size of their heads; another than this node's own is rare.
        shape = nibble_shape(layout)
        self._nibbles = NibbleCodec(shape) if shape is not None else None
        self._native: NativeDecoder | None = None
        if self._nibbles is not None and native.functions is not None:
            self._native = native.NativeDecoder(self._nibbles.shape, self._nibbles.frames, self._planes)
            # Up to the total length.
            self._fixed = pack_fixed(
                NIBBLES, layout, len(self._nibbles.sections), 0, bytes(ID_BYTES), self.namespace
            )[:TOTAL_BYTES_AT]

    def encode(self, block_hash: bytes, slot: Buffer) -> memoryview:
        """Encode one block.

        Args:
            block_hash: The block's identity, 16 bytes.
            slot: Its bytes in the form of the slots, exactly `form.slot_bytes`.

        Returns:
            The encoded block, read-only, in memory of its own.

        Raises:
            ValueError: The hash or the slot has the wrong length, or the slot holds no block.
        """
        if len(block_hash) != ID_BYTES:
            raise ValueError(f"a block hash has {ID_BYTES} bytes, got {len(block_hash)}")
        if self._planes is None:
            raw = self._block_array(slot)
            shards = self._nibbles.split(raw) if self._nibbles is not None else None
        else:
            shards = self._planes.planes(slot)
        if shards is not None and self._nibbles is not None:
            pieces = self._nibbles.encode(shards)
            if self._pays(pieces):
                return self._assemble(NIBBLES, block_hash, pieces)
        if self._planes is not None:
            raw = np.empty(self.layout.block_bytes, np.uint8)
            self._planes.merge(slot, raw)
        return self._encode_raw(block_hash, raw)

    def decode(self, block_hash: bytes, encoded: Buffer | StoredFile, out: bytearray | memoryview) -> None:
        """Verify an encoded block and decode it into `out`.

        Args:
            block_hash: The identity that the block must have, 16 bytes.
            encoded: The encoded block, in memory or in a file; any bytes at all are safe.
            out: Writable room of exactly `form.slot_bytes`; for planes at a multiple of 4 bytes. After
                `CorruptBlock` or `SlotMisfit` it may hold garbage.

        Raises:
            CorruptBlock: The bytes are not, to the last bit, a block of this hash, namespace and layout.
            SlotMisfit: They are, but slots of this form cannot hold the block.
            ValueError: `out` is read-only or has the wrong length.
        """
        room = memoryview(out)
        if room.readonly:
            raise ValueError("the room for the decoded block is read-only")
        if room.nbytes != self.form.slot_bytes:
            raise ValueError(f"a block needs a slot of {self.form.slot_bytes} bytes, got {room.nbytes}")
        length = encoded.length if isinstance(encoded, StoredFile) else memoryview(encoded).nbytes
        if length > self.max_encoded_bytes:
            raise CorruptBlock(f"{length} bytes are more than any block of this layout")
        if self._native is not None:
            fixed = b"".join((self._fixed, length.to_bytes(4, "little"), block_hash, self.namespace))
            if self._native.decode(fixed, encoded, length, np.frombuffer(room, np.uint8)):
                return
        # What fails there is corrupt, or of another kind; here it is decoded, or an error says what is wrong.
        view = memoryview(encoded.read() if isinstance(encoded, StoredFile) else encoded)
        self._decode_by_sections(block_hash, view.cast("B").toreadonly(), room)

    def _decode_by_sections(self, block_hash: bytes, view: memoryview, room: memoryview) -> None:
        header = read_header(view)
        self._check_identity(header, block_hash, len(view))
        if self._planes is None:
            self._decode_raw(header, view, self._block_array(room))
        elif header.codec == NIBBLES and header.layout.head_dim == self.layout.head_dim:
            shards = self._planes.planes(room)
            self._own_nibbles(header).decode(header.sections, _verified(view, header), shards)
            self._planes.complete(room, shards)
        else:
            raw = np.empty(self.layout.block_bytes, np.uint8)
            self._decode_raw(header, view, raw)
            self._planes.split(raw, room)
            if not self._planes.whole(room):
                raise SlotMisfit(f"block {block_hash.hex()} has too many escapes for plane slots")

    def _decode_raw(self, header: BlockHeader, view: memoryview, raw: Bytes) -> None:
        stored = _verified(view, header)
        if header.codec == RAW:
            np.copyto(raw, np.frombuffer(next(stored), np.uint8))
        elif header.codec == PLANES:
            self._bytes.decode(stored, raw)
        else:
            self._own_nibbles(header).decode_raw(header.sections, stored, raw)

    def _encode_raw(self, block_hash: bytes, raw: Bytes) -> memoryview:
        pieces = self._bytes.encode(raw)
        if pieces is not None and self._pays(pieces):
            return self._assemble(PLANES, block_hash, pieces)
        return self._assemble(RAW, block_hash, [Piece(PLAIN, raw.data, raw.size, aligned=True)])

    def _block_array(self, buffer: Buffer) -> Bytes:
        array = np.frombuffer(buffer, np.uint8)
        if array.size != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, got {array.size}")
        return array

    def _own_nibbles(self, header: BlockHeader) -> NibbleCodec:
        """Return the codec of the heads that a block was encoded with."""
        if self._nibbles is not None and header.layout.head_dim == self.layout.head_dim:
            return self._nibbles
        shape = nibble_shape(header.layout)
        if shape is None:
            raise CorruptBlock(f"no nibbles can be made of {header.layout}")
        from kvtier.codec.nibble_codec import NibbleCodec

        return NibbleCodec(shape)

    def _pays(self, pieces: Sequence[Piece]) -> bool:
        stored_bytes = header_bytes(len(pieces)) + sum(len(piece.data) for piece in pieces)
        return stored_bytes <= WORTH_IT * self.layout.block_bytes

    def _assemble(self, codec: int, block_hash: bytes, pieces: Sequence[Piece]) -> memoryview:
        end = header_bytes(len(pieces))
        sections: list[Section] = []
        for encoding, data, raw_bytes, aligned in pieces:
            start = -(-end // ALIGNMENT) * ALIGNMENT if aligned else end
            sections.append(Section(encoding, start, len(data), raw_bytes, xxhash.xxh3_64_intdigest(data)))
            end = start + len(data)
        encoded = np.empty(end, np.uint8)
        view = encoded.data
        header = pack_header(
            BlockHeader(codec, self.layout, block_hash, self.namespace, end, tuple(sections))
        )
        view[: len(header)] = header
        written = len(header)
        for section, piece in zip(sections, pieces, strict=True):
            encoded[written : section.offset] = 0
            written = section.offset + section.stored_bytes
            encoded[section.offset : written] = np.frombuffer(piece.data, np.uint8)
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
        expected = self._expected(header)
        if len(expected) != len(header.sections) or any(
            section.encoding not in encodings or raw_bytes not in (None, section.raw_bytes)
            for section, (encodings, raw_bytes) in zip(header.sections, expected, strict=True)
        ):
            raise CorruptBlock("the sections are not those of this layout")

    def _expected(self, header: BlockHeader) -> list[Expected]:
        if header.codec == RAW:
            return [Expected((PLAIN,), self.layout.block_bytes)]
        return self._bytes.sections if header.codec == PLANES else self._own_nibbles(header).sections


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
    for _ in _verified(view, header):
        pass


def _check_gaps(view: memoryview, header: BlockHeader) -> None:
    end = header_bytes(len(header.sections))
    for section in header.sections:
        if view[end : section.offset].tobytes() != bytes(section.offset - end):
            raise CorruptBlock(f"the gap before byte {section.offset} is not zero")
        end = section.offset + section.stored_bytes


def _verified(view: memoryview, header: BlockHeader) -> Iterator[memoryview]:
    """Yield the stored bytes of each section when they, and the gap before, are as they were written."""
    _check_gaps(view, header)
    for section in header.sections:
        stored = view[section.offset : section.offset + section.stored_bytes]
        if xxhash.xxh3_64_intdigest(stored) != section.checksum:
            raise CorruptBlock(f"checksum of the section at byte {section.offset} does not match")
        yield stored
