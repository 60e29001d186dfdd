"""Codec 2: exponents as nibbles below their channel's largest one, compressed, and a plain rest."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvtier.codec.format import PLAIN, ZSTD, Piece, Section
from kvtier.codec.kernels import Bytes
from kvtier.codec.native import SectionsDecoder
from kvtier.codec.nibble_kernels import escapes_ascend
from kvtier.codec.nibbles import NibbleShape, Planes
from kvtier.codec.planes import decompress, decompressor, frame_cuts, huffman_only
from kvtier.errors import CorruptBlock

ENTRY_BYTES = 4
"""Bytes of one escape."""


class _Workspace(threading.local):
    def __init__(self, shape: NibbleShape, shards: int) -> None:
        self.compress = huffman_only()
        self.decompressor = decompressor()
        self.shards = [shape.room() for _ in range(shards)]


class NibbleCodec:
    """Encodes and decodes shards that were taken apart; thread-safe.

    Attributes:
        shape: Geometry of a shard.
        sections: What the table of sections must say: encodings and raw lengths, None for that of escapes.
    """

    def __init__(self, shape: NibbleShape) -> None:
        self.shape = shape
        parts = shape.layout.kv_factor
        self._base_cuts = list(itertools.pairwise(frame_cuts(shape.base_bytes // parts, parts)))
        self._nibble_cuts = list(itertools.pairwise(frame_cuts(shape.nibble_bytes // parts, parts)))
        frames: list[tuple[int, int | None]] = [
            (ZSTD, stop - start) for start, stop in (*self._base_cuts, *self._nibble_cuts)
        ]
        shards = shape.layout.shards
        self.sections = [*frames, (PLAIN, None)] * shards + [(PLAIN, shape.rest_bytes)] * shards
        self._workspace = _Workspace(shape, shards)

    def split(self, raw: Bytes) -> list[Planes] | None:
        """Take a block apart in memory that the thread's next call uses again; None if it does not fit."""
        shards = self._workspace.shards
        for planes, part in zip(shards, raw.reshape(len(shards), -1), strict=True):
            self.shape.split(part, planes)
            if not planes.fits:
                return None
        return shards

    def encode(self, shards: Sequence[Planes]) -> list[Piece]:
        """Encode a block.

        Raises:
            ValueError: It has too many escapes, or escapes outside of it.
        """
        pieces: list[Piece] = []
        compress = self._workspace.compress
        for planes in shards:
            bases, nibbles = planes.bases.reshape(-1).data, planes.nibbles.reshape(-1).data
            for data, cuts in ((bases, self._base_cuts), (nibbles, self._nibble_cuts)):
                pieces += [Piece(ZSTD, compress(data[start:stop]), stop - start) for start, stop in cuts]
            # A GPU writes them in any order.
            escapes = np.sort(planes.escapes[: planes.count])
            if not planes.fits or not escapes_ascend(escapes, self.shape.elements):
                raise ValueError(f"no shard: {planes.count} escapes, or some outside of it")
            pieces.append(Piece(PLAIN, escapes.view(np.uint8).data, escapes.nbytes))
        for shard, planes in enumerate(shards):
            rest = planes.rest.reshape(-1).data
            pieces.append(Piece(PLAIN, rest, len(rest), aligned=shard == 0))
        return pieces

    def decode(self, stored: Iterator[memoryview], shards: Sequence[Planes]) -> None:
        """Decode the verified bytes of a block's sections into room for its shards.

        Raises:
            CorruptBlock: A section is not what it should be.
        """
        self._decode_compressed(stored, shards)
        for planes, rest in zip(shards, stored, strict=True):
            np.copyto(planes.rest, np.frombuffer(rest, np.uint8).reshape(self.shape.rest))

    def decode_at_once(
        self,
        decoder: SectionsDecoder,
        encoded: memoryview,
        sections: Sequence[Section],
        shards: Sequence[Planes],
    ) -> None:
        """Verify and decode a block's sections into room for its shards, without the GIL.

        Args:
            decoder: Does it.
            encoded: The block.
            sections: Its table, which was checked.
            shards: Room for its shards; a rest that cannot be written is the block's own, only verified.

        Raises:
            CorruptBlock: A section is not what it should be.
        """
        per_shard = len(self._base_cuts) + len(self._nibble_cuts) + 1
        for planes, section in zip(shards, sections[per_shard - 1 :: per_shard], strict=False):
            self._set_count(planes, section.stored_bytes)
        failed = decoder(encoded, sections, list(self._targets(shards)))
        if failed >= 0:
            what = "checksum of" if failed < len(sections) else "frame in"
            raise CorruptBlock(f"{what} section {failed % len(sections)} is wrong")
        for planes in shards:
            self._check_escapes(planes)

    def _targets(self, shards: Sequence[Planes]) -> Iterator[int]:
        """Yield the address that each section is decoded to."""
        for planes in shards:
            for array, cuts in ((planes.bases, self._base_cuts), (planes.nibbles, self._nibble_cuts)):
                first = array.ctypes.data
                yield from (first + start for start, _ in cuts)
            yield planes.escapes.ctypes.data
        yield from (planes.rest.ctypes.data if planes.rest.flags.writeable else 0 for planes in shards)

    def decode_raw_at_once(
        self, decoder: SectionsDecoder, encoded: memoryview, sections: Sequence[Section], raw: Bytes
    ) -> None:
        """Verify and decode a block's sections into a raw block, without the GIL.

        Raises:
            CorruptBlock: A section is not what it should be.
        """
        room = self._workspace.shards
        shards = []
        for planes, section in zip(room, sections[-len(room) :], strict=True):
            plain = encoded[section.offset : section.offset + section.stored_bytes]
            rest = np.frombuffer(plain, np.uint8).reshape(self.shape.rest)
            shards.append(replace(planes, rest=rest))
        self.decode_at_once(decoder, encoded, sections, shards)
        for planes, part in zip(shards, raw.reshape(len(shards), -1), strict=True):
            self.shape.merge(planes, part)

    def decode_raw(self, stored: Iterator[memoryview], raw: Bytes) -> None:
        """Decode the verified bytes of a block's sections into a raw block.

        Raises:
            CorruptBlock: A section is not what it should be.
        """
        shards = self._workspace.shards
        self._decode_compressed(stored, shards)
        for planes, rest, part in zip(shards, stored, raw.reshape(len(shards), -1), strict=True):
            plain = np.frombuffer(rest, np.uint8).reshape(self.shape.rest)
            self.shape.merge(replace(planes, rest=plain), part)

    def _decode_compressed(self, stored: Iterator[memoryview], shards: Sequence[Planes]) -> None:
        context = self._workspace.decompressor
        for planes in shards:
            bases, nibbles = planes.bases.reshape(-1).data, planes.nibbles.reshape(-1).data
            for data, cuts in ((bases, self._base_cuts), (nibbles, self._nibble_cuts)):
                for start, stop in cuts:
                    decompress(context, next(stored), data[start:stop])
            listed = next(stored)
            self._set_count(planes, len(listed))
            planes.escapes[: planes.count] = np.frombuffer(listed, "<u4")
            self._check_escapes(planes)

    def _set_count(self, planes: Planes, listed_bytes: int) -> None:
        planes.count, odd = divmod(listed_bytes, ENTRY_BYTES)
        if odd or not planes.fits:
            raise CorruptBlock(f"a list of escapes of {listed_bytes} bytes")

    def _check_escapes(self, planes: Planes) -> None:
        if not escapes_ascend(planes.escapes[: planes.count], self.shape.elements):
            raise CorruptBlock("escapes out of order, or outside of the block")
