"""Codec 1: blocks split into a plane of bytes that is compressed and a plain rest."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from kvtier.codec.format import PLAIN, WORTH_IT, ZSTD, Bytes, Expected, Piece
from kvtier.codec.planes import Scheme, decompress, decompressor, frame_cuts, scheme_for
from kvtier.layout import BlockLayout


class _Workspace(threading.local):
    """One thread's zstd contexts and scratch memory, reused from block to block to spare page faults."""

    def __init__(self, scheme: Scheme, rows: int, kv_factor: int, cuts: Sequence[int]) -> None:
        self.plane = np.empty((kv_factor, rows, scheme.plane_row_bytes), np.uint8)
        self.rest = np.empty((rows, kv_factor, scheme.rest_row_bytes), np.uint8)
        plane = self.plane.reshape(-1).data
        self.frames = [plane[start:stop] for start, stop in itertools.pairwise(cuts)]
        self.compress = scheme.compressor()
        self.decompressor = decompressor()


class ByteCodec:
    """Encodes and decodes raw blocks of one layout; thread-safe.

    Attributes:
        sections: What the table of sections must say.
    """

    def __init__(self, layout: BlockLayout) -> None:
        self._scheme = scheme_for(layout)
        rows = layout.shards * layout.layers
        self._rest_shape = (rows, layout.kv_factor, self._scheme.rest_row_bytes)
        self._raw_shape = (rows, layout.kv_factor, layout.block_bytes // (rows * layout.kv_factor))
        cuts = frame_cuts(rows * self._scheme.plane_row_bytes, layout.kv_factor)
        self._workspace = _Workspace(self._scheme, rows, layout.kv_factor, cuts)
        rest_bytes = rows * layout.kv_factor * self._scheme.rest_row_bytes
        frames = [Expected((ZSTD,), stop - start) for start, stop in itertools.pairwise(cuts)]
        self.sections = frames + [Expected((PLAIN,), rest_bytes)] * (rest_bytes > 0)

    def encode(self, raw: Bytes) -> list[Piece] | None:
        """Encode a block; None when its first frame says that it does not pay.

        The last piece may lie in memory that the thread's next call uses again.
        """
        work = self._workspace
        self._scheme.split(raw.reshape(self._raw_shape), work.plane, work.rest)
        first, *others = work.frames
        frames = [work.compress(first)]
        if len(frames[0]) > WORTH_IT * len(first):
            return None
        frames += map(work.compress, others)
        pieces = [Piece(ZSTD, data, len(frame)) for data, frame in zip(frames, work.frames, strict=True)]
        if work.rest.size:
            pieces.append(Piece(PLAIN, work.rest.reshape(-1).data, work.rest.size, aligned=True))
        return pieces

    def decode(self, stored: Iterator[memoryview], raw: Bytes) -> None:
        """Decode the verified bytes of a block's sections.

        Raises:
            CorruptBlock: A frame is not what it should be.
        """
        work = self._workspace
        for frame in work.frames:
            decompress(work.decompressor, next(stored), frame)
        rest: Bytes = work.rest
        for plain in stored:
            rest = np.frombuffer(plain, np.uint8).reshape(self._rest_shape)
        self._scheme.merge(raw.reshape(self._raw_shape), work.plane, rest)
