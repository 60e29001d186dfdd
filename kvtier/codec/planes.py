"""Which split and which compression serve which dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import zstandard

from kvtier.codec import kernels
from kvtier.codec.format import Bytes
from kvtier.errors import CorruptBlock
from kvtier.layout import ITEM_BYTES, BlockLayout

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAX_FRAME_BYTES = 128 << 10
"""Bytes of the plane in one zstd frame at most: one zstd block, and enough work for each call."""

_FLIP = {"float8_e4m3fn": 0, "float8_e5m2": 0, "int8": 0x7F}
"""The one-byte dtypes of which something is known, and the `flip` of their kernels."""

Compress = Callable[[memoryview], bytes]
"""Makes one zstd frame of some bytes."""

_LITERAL_COMPRESSION_MODE, _ENABLED = 1002, 1
"""`ZSTD_c_literalCompressionMode` and `ZSTD_ps_enable` of zstd.h (since 1.3.8)."""


def huffman_only() -> Compress:
    """Make a compressor that codes literals by Huffman and looks for next to no matches.

    KV has no repetitions worth finding: in exponent planes zstd level 1 finds some by chance, and is three
    times slower and larger for it (on real bf16 KV a ratio of 1.44 instead of 1.47). The fastest level hardly
    looks, but leaves literals uncoded unless told otherwise, which only the standard library's binding can
    do; the nearest that `zstandard` can be set to is a quarter slower. The frames are ordinary ones.
    """
    options = {zstd.CompressionParameter.compression_level: -(1 << 17), _LITERAL_COMPRESSION_MODE: _ENABLED}
    compressor = zstd.ZstdCompressor(options=options)
    return partial(compressor.compress, mode=compressor.FLUSH_FRAME)


def level_1() -> Compress:
    """Make a compressor for bytes of unknown meaning, which may well repeat."""
    return zstandard.ZstdCompressor(level=1).compress


def frame_cuts(part_bytes: int, parts: int) -> list[int]:
    """Return where a plane is cut into frames: each part (K, V) into equal ones, the last maybe shorter."""
    frames = -(-part_bytes // MAX_FRAME_BYTES)
    step = -(-part_bytes // frames)
    return [part * part_bytes + start for part in range(parts) for start in range(0, part_bytes, step)] + [
        parts * part_bytes
    ]


def decompressor() -> zstandard.ZstdDecompressor:
    """Make a decompressor of single frames; not for several threads at once."""
    return zstandard.ZstdDecompressor(max_window_size=MAX_FRAME_BYTES)


def decompress(decompressor: zstandard.ZstdDecompressor, frame: memoryview, out: memoryview) -> None:
    """Decompress one frame, which has to fill `out` exactly.

    Raises:
        CorruptBlock: It does not.
    """
    try:
        content_bytes = zstandard.frame_content_size(frame)
        if content_bytes == len(out) == decompressor.stream_reader(frame).readinto(out):
            return
    except zstandard.ZstdError as error:
        raise CorruptBlock(f"not a zstd frame: {error}") from error
    raise CorruptBlock(f"a zstd frame of {content_bytes} bytes instead of {len(out)}")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How blocks of one layout are taken apart.

    Attributes:
        split: Fills plane `[kv_factor, rows, plane_row_bytes]` and rest `[rows, kv_factor, rest_row_bytes]`
            from the raw block `[rows, kv_factor, bytes of a row]`; arguments (raw, plane, rest).
        merge: The reverse, same arguments.
        plane_row_bytes: Bytes that one row adds to the plane, which is compressed.
        rest_row_bytes: Bytes that it adds to the rest, which is stored as it is.
        compressor: Makes the compressor of the plane's frames, one for each thread.
    """

    split: Callable[[Bytes, Bytes, Bytes], None]
    merge: Callable[[Bytes, Bytes, Bytes], None]
    plane_row_bytes: int
    rest_row_bytes: int
    compressor: Callable[[], Compress]


def scheme_for(layout: BlockLayout) -> Scheme:
    """Choose the scheme of a layout. It is part of the format: a reader must choose the same."""
    n = layout.row_elements
    if layout.dtype in ("bfloat16", "float16"):
        return Scheme(kernels.split_2_byte, kernels.merge_2_byte, n, n, huffman_only)
    if layout.dtype == "float32":
        return Scheme(kernels.split_4_byte, kernels.merge_4_byte, n, 3 * n, huffman_only)
    if layout.dtype in _FLIP and n % (2 * kernels.PAIR_DISTANCE) == 0:
        split = partial(kernels.split_nibbles, _FLIP[layout.dtype])
        merge = partial(kernels.merge_nibbles, _FLIP[layout.dtype])
        return Scheme(split, merge, n // 2, n // 2, huffman_only)
    return Scheme(_gather, _scatter, n * ITEM_BYTES[layout.dtype], 0, level_1)


def _gather(raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    np.copyto(plane, raw.transpose(1, 0, 2))


def _scatter(raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    np.copyto(raw, plane.transpose(1, 0, 2))
