"""Codec 2: exponents as nibbles below their channel's largest one, compressed, and a plain rest."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvtier.codec.format import PLAIN, SPLIT, ZSTD, Bytes, Expected, Piece, Section
from kvtier.codec.kernels import join_halves, split_halves
from kvtier.codec.nibble_kernels import escapes_ascend
from kvtier.codec.nibbles import NibbleShape, Planes
from kvtier.codec.planes import MAX_FRAME_BYTES, decompress, decompressor, frame_cuts, huffman_only
from kvtier.errors import CorruptBlock

ENTRY_BYTES = 4
"""Bytes of one escape."""


class _Workspace(threading.local):
    def __init__(self, shape: NibbleShape, shards: int) -> None:
        self.compress = huffman_only()
        self.decompressor = decompressor()
        self.shards = [shape.room() for _ in range(shards)]
        self.halves = np.empty((2, MAX_FRAME_BYTES // 2), np.uint8)


class NibbleCodec:
    """Encodes and decodes shards that were taken apart; thread-safe.

    Attributes:
        shape: Geometry of a shard.
        frames: For each frame of a shard its raw length, and 1 where it may be split, else 0.
        sections: What the table of sections must say.
    """

    def __init__(self, shape: NibbleShape) -> None:
        self.shape = shape
        parts = shape.layout.kv_factor
        self._base_cuts = list(itertools.pairwise(frame_cuts(shape.base_bytes // parts, parts)))
        self._nibble_cuts = list(itertools.pairwise(frame_cuts(shape.nibble_bytes // parts, parts)))
        self.frames = [(stop - start, 0) for start, stop in self._base_cuts]
        self.frames += [(stop - start, 1) for start, stop in self._nibble_cuts]
        # K loses more of its ratio by being split than V, and V gains as much speed.
        self._split_from = shape.nibble_bytes // (parts if shape.layout.dtype == "bfloat16" else 1)
        frames: list[Expected] = [
            Expected((ZSTD, SPLIT) if splittable else (ZSTD,), length) for length, splittable in self.frames
        ]
        shards = shape.layout.shards
        self.sections = [*frames, Expected((PLAIN,), None)] * shards
        self.sections += [Expected((PLAIN,), shape.rest_bytes)] * shards
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
        for planes in shards:
            bases, nibbles = planes.bases.reshape(-1), planes.nibbles.reshape(-1)
            pieces += [self._whole(bases[start:stop]) for start, stop in self._base_cuts]
            for start, stop in self._nibble_cuts:
                encode = self._whole if start < self._split_from else self._split
                pieces.append(encode(nibbles[start:stop]))
            # A GPU writes them in any order.
            escapes = np.sort(planes.escapes[: planes.count])
            if not planes.fits or not escapes_ascend(escapes, self.shape.elements):
                raise ValueError(f"no shard: {planes.count} escapes, or some outside of it")
            pieces.append(Piece(PLAIN, escapes.view(np.uint8).data, escapes.nbytes))
        for shard, planes in enumerate(shards):
            rest = planes.rest.reshape(-1).data
            pieces.append(Piece(PLAIN, rest, len(rest), aligned=shard == 0))
        return pieces

    def decode(
        self, sections: Sequence[Section], stored: Iterator[memoryview], shards: Sequence[Planes]
    ) -> None:
        """Decode a block into room for its shards.

        Args:
            sections: Its table.
            stored: The verified bytes of each section.
            shards: The room.

        Raises:
            CorruptBlock: A section is not what it should be.
        """
        self._decode_compressed(sections, stored, shards)
        for planes, rest in zip(shards, stored, strict=True):
            np.copyto(planes.rest, np.frombuffer(rest, np.uint8).reshape(self.shape.rest))

    def decode_raw(self, sections: Sequence[Section], stored: Iterator[memoryview], raw: Bytes) -> None:
        """Decode a block into room for its raw bytes; see `decode`.

        Raises:
            CorruptBlock: A section is not what it should be.
        """
        shards = self._workspace.shards
        self._decode_compressed(sections, stored, shards)
        for planes, rest, part in zip(shards, stored, raw.reshape(len(shards), -1), strict=True):
            plain = np.frombuffer(rest, np.uint8).reshape(self.shape.rest)
            self.shape.merge(replace(planes, rest=plain), part)

    def _whole(self, data: Bytes) -> Piece:
        return Piece(ZSTD, self._workspace.compress(data.data), data.size)

    def _split(self, data: Bytes) -> Piece:
        low, high = self._workspace.halves[:, : (data.size + 1) // 2]
        split_halves(data, low, high)
        return Piece(SPLIT, b"".join((low, self._workspace.compress(high.data))), data.size)

    def _decode_compressed(
        self, sections: Sequence[Section], stored: Iterator[memoryview], shards: Sequence[Planes]
    ) -> None:
        encodings = iter([section.encoding for section in sections])
        for planes in shards:
            bases, nibbles = planes.bases.reshape(-1), planes.nibbles.reshape(-1)
            for data, cuts in ((bases, self._base_cuts), (nibbles, self._nibble_cuts)):
                for start, stop in cuts:
                    self._decode_frame(next(encodings), next(stored), data[start:stop])
            next(encodings)
            listed = next(stored)
            self._set_count(planes, len(listed))
            planes.escapes[: planes.count] = np.frombuffer(listed, "<u4")
            if not escapes_ascend(planes.escapes[: planes.count], self.shape.elements):
                raise CorruptBlock("escapes out of order, or outside of the block")

    def _decode_frame(self, encoding: int, data: memoryview, out: Bytes) -> None:
        context = self._workspace.decompressor
        if encoding == ZSTD:
            decompress(context, data, out.data)
            return
        half = (out.size + 1) // 2
        if len(data) < half:
            raise CorruptBlock(f"a split section of {len(data)} bytes for {out.size}")
        high = self._workspace.halves[1, :half]
        decompress(context, data[half:], high.data)
        join_halves(np.frombuffer(data[:half], np.uint8), high, out)

    def _set_count(self, planes: Planes, listed_bytes: int) -> None:
        planes.count, odd = divmod(listed_bytes, ENTRY_BYTES)
        if odd or not planes.fits:
            raise CorruptBlock(f"a list of escapes of {listed_bytes} bytes")
