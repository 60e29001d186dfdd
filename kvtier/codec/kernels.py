"""Compiled loops that take a block apart into a compressible plane and a noisy rest, and join them again.

Every element is first rotated left by one bit: that moves the sign behind the mantissa and leaves the
exponent alone in the highest bits. Exponents vary little and compress well; sign and mantissa are noise.

All kernels take three C-contiguous arrays of bytes, so buffers may lie at any address, and hold no GIL:

    raw: `[rows, kv_factor, bytes of a row]`, the block; rows is shards times layers.
    plane: `[kv_factor, rows, ...]`: the rows of K of all layers, then those of V.
    rest: `[rows, kv_factor, ...]`, in the order of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit, types

from kvtier.codec.format import Bytes

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

PAIR_DISTANCE = 128
"""Elements between the two whose nibbles share a byte: one token or two of the same channel at head sizes
128 and 64, a rotary pair at 256. Real KV in e4m3 then shrinks by 1.19; by 1.18 with neighbours paired."""

_WRITABLE = types.Array(types.uint8, 3, "C")
_READABLE = types.Array(types.uint8, 3, "C", readonly=True)
_WRITABLE_ROW = types.Array(types.uint8, 1, "C")
_READABLE_ROW = types.Array(types.uint8, 1, "C", readonly=True)
_SPLIT = types.void(_READABLE, _WRITABLE, _WRITABLE)
_MERGE = types.void(_WRITABLE, _WRITABLE, _READABLE)
_SPLIT_HALVES = types.void(_READABLE_ROW, _WRITABLE_ROW, _WRITABLE_ROW)
_JOIN_HALVES = types.void(_READABLE_ROW, _READABLE_ROW, _WRITABLE_ROW)
_SPLIT_NIBBLES = types.void(types.int64, _READABLE, _WRITABLE, _WRITABLE)
_MERGE_NIBBLES = types.void(types.int64, _WRITABLE, _WRITABLE, _READABLE)


def compiled(signature: Any) -> Callable[[Kernel], Kernel]:
    """Compile for exactly `signature` at import, from numba's cache where there is one.

    So nothing compiles in the middle of serving. Where no cache directory can be written (a read-only
    container without a home), every start of a process compiles anew, which takes a few seconds.
    """

    def decorate(function: Kernel) -> Kernel:
        try:
            kernel: Kernel = njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):
            kernel = njit(signature, nogil=True)(function)
        return kernel

    return decorate


@compiled(_SPLIT)
def split_2_byte(raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    """Split bfloat16 or float16: the high byte of each rotated element to `plane`, the low one to `rest`."""
    for row in range(raw.shape[0]):
        for part in range(raw.shape[1]):
            x, high, low = raw[row, part], plane[part, row], rest[row, part]
            for i in range(high.size):
                high[i] = x[2 * i + 1] << 1 | x[2 * i] >> 7
                low[i] = x[2 * i] << 1 | x[2 * i + 1] >> 7


@compiled(_MERGE)
def merge_2_byte(raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    """Fill `raw` from what `split_2_byte` made of it."""
    for row in range(raw.shape[0]):
        for part in range(raw.shape[1]):
            x, high, low = raw[row, part], plane[part, row], rest[row, part]
            for i in range(high.size):
                x[2 * i] = high[i] << 7 | low[i] >> 1
                x[2 * i + 1] = low[i] << 7 | high[i] >> 1


@compiled(_SPLIT)
def split_4_byte(raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    """Split float32: the highest byte of each rotated element to `plane`, the others to `rest`.

    A row of `rest` holds all lowest bytes of the row, then all second ones, then all third ones.
    """
    for row in range(raw.shape[0]):
        for part in range(raw.shape[1]):
            x, byte3 = raw[row, part], plane[part, row]
            n = byte3.size
            byte0, byte1, byte2 = rest[row, part, :n], rest[row, part, n : 2 * n], rest[row, part, 2 * n :]
            for i in range(n):
                byte3[i] = x[4 * i + 3] << 1 | x[4 * i + 2] >> 7
                byte2[i] = x[4 * i + 2] << 1 | x[4 * i + 1] >> 7
                byte1[i] = x[4 * i + 1] << 1 | x[4 * i] >> 7
                byte0[i] = x[4 * i] << 1 | x[4 * i + 3] >> 7


@compiled(_MERGE)
def merge_4_byte(raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    """Fill `raw` from what `split_4_byte` made of it."""
    for row in range(raw.shape[0]):
        for part in range(raw.shape[1]):
            x, byte3 = raw[row, part], plane[part, row]
            n = byte3.size
            byte0, byte1, byte2 = rest[row, part, :n], rest[row, part, n : 2 * n], rest[row, part, 2 * n :]
            for i in range(n):
                x[4 * i] = byte1[i] << 7 | byte0[i] >> 1
                x[4 * i + 1] = byte2[i] << 7 | byte1[i] >> 1
                x[4 * i + 2] = byte3[i] << 7 | byte2[i] >> 1
                x[4 * i + 3] = byte0[i] << 7 | byte3[i] >> 1


@compiled(_SPLIT_NIBBLES)
def split_nibbles(flip: int, raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    """Split float8 or int8: high nibbles of the rotated elements to `plane`, low ones to `rest`.

    A row is cut into runs of `2 * PAIR_DISTANCE` elements, of which it must be a multiple. An element of the
    first half of a run gives the low nibble of a byte, its counterpart in the second half the high one.

    Args:
        flip: Bits that are inverted in negative elements before all else: 0 where they are sign and magnitude
            (float8), 0x7F where they are two's complement (int8), so that small numbers look alike.
        raw: As in all kernels; so are `plane` and `rest`.
        plane: High nibbles.
        rest: Low nibbles.
    """
    d, bits = PAIR_DISTANCE, np.uint8(flip)
    for row in range(raw.shape[0]):
        for part in range(raw.shape[1]):
            for run in range(raw.shape[2] // (2 * d)):
                first = raw[row, part, 2 * d * run : 2 * d * run + d]
                second = raw[row, part, 2 * d * run + d : 2 * d * (run + 1)]
                high = plane[part, row, d * run : d * (run + 1)]
                low = rest[row, part, d * run : d * (run + 1)]
                for i in range(d):
                    a = np.uint8(first[i] ^ (first[i] >> 7) * bits)
                    b = np.uint8(second[i] ^ (second[i] >> 7) * bits)
                    a = np.uint8(a << 1 | a >> 7)
                    b = np.uint8(b << 1 | b >> 7)
                    high[i] = a >> 4 | b & 0xF0
                    low[i] = a & 0x0F | b << 4


@compiled(_MERGE_NIBBLES)
def merge_nibbles(flip: int, raw: Bytes, plane: Bytes, rest: Bytes) -> None:
    """Fill `raw` from what `split_nibbles` made of it; same arguments."""
    d, bits = PAIR_DISTANCE, np.uint8(flip)
    for row in range(raw.shape[0]):
        for part in range(raw.shape[1]):
            for run in range(raw.shape[2] // (2 * d)):
                first = raw[row, part, 2 * d * run : 2 * d * run + d]
                second = raw[row, part, 2 * d * run + d : 2 * d * (run + 1)]
                high = plane[part, row, d * run : d * (run + 1)]
                low = rest[row, part, d * run : d * (run + 1)]
                for i in range(d):
                    a = np.uint8(high[i] << 4 | low[i] & 0x0F)
                    b = np.uint8(high[i] & 0xF0 | low[i] >> 4)
                    a = np.uint8(a >> 1 | a << 7)
                    b = np.uint8(b >> 1 | b << 7)
                    first[i] = a ^ (a >> 7) * bits
                    second[i] = b ^ (b >> 7) * bits


@compiled(_SPLIT_HALVES)
def split_halves(data: Bytes, low: Bytes, high: Bytes) -> None:
    """Take the halves of all nibbles apart: two bits each, those of bytes from both ends of `data` together.

    Byte i of `low` holds the lower two bits of the nibbles of `data[i]` and, two places higher, of
    `data[i + h]`, where h is half of the bytes, rounded up; byte i of `high` the upper two bits. What would
    be behind the last byte counts as 0.

    Args:
        data: Bytes of two nibbles.
        low: h bytes.
        high: h bytes.
    """
    first, second = data[: low.size], data[low.size :]
    for i in range(second.size):
        x, y = first[i], second[i]
        low[i] = x & 0x33 | y << 2 & 0xCC
        high[i] = x >> 2 & 0x33 | y & 0xCC
    if second.size < first.size:
        low[-1], high[-1] = first[-1] & 0x33, first[-1] >> 2 & 0x33


@compiled(_JOIN_HALVES)
def join_halves(low: Bytes, high: Bytes, data: Bytes) -> None:
    """Fill `data` from what `split_halves` made of it; same arguments."""
    first, second = data[: low.size], data[low.size :]
    for i in range(second.size):
        x, y = low[i], high[i]
        first[i] = x & 0x33 | y << 2 & 0xCC
        second[i] = x >> 2 & 0x33 | y & 0xCC
    if second.size < first.size:
        first[-1] = low[-1] & 0x33 | high[-1] << 2 & 0xCC
