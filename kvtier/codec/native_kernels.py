"""A whole block of codec 2 verified and decoded by one compiled function, which never takes the GIL.

It reads the block from memory, or from a file piece by piece: each piece is checked and decoded while it is
in the core's cache, and what is stored plain is read straight to where it belongs. `docs/format.md` says what
a block is; this is the same reader as `BlockCodec`'s, which says what is wrong with a block that fails here.

Who changes a compiled function in another file that is called from here has to touch this file too: numba's
cache does not see that otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types

from kvtier.codec.format import FIXED_BYTES, MAX_ALIGNMENT, PLAIN, SECTION_BYTES, SPLIT, ZSTD
from kvtier.codec.kernels import compiled, join_halves
from kvtier.codec.nibble_kernels import (
    escapes_ascend,
    merge_layer_bf16,
    merge_layer_e4m3,
    set_exponents_bf16,
    set_exponents_e4m3,
)
from kvtier.codec.slots import HEADER_BYTES

FRAME, SPLITTABLE, LISTED, REST = 0, 1, 2, 3
"""What a section is: a zstd frame; one that may also be split; a list of escapes; or the rest of a shard."""

TO_PLANES, TO_BF16, TO_E4M3 = 0, 1, 2
"""What is made of a block: plane slots, or raw blocks of one of two dtypes."""

PIECE = 256 << 10
"""Bytes that are read and checked at a time: they fit in a core's cache, and few calls are made."""

_ADDRESS: Any = types.uintp
_LENGTH: Any = types.uint64
_xxh3: Any = types.ExternalFunction("kvtier_XXH3_64bits", _LENGTH(_ADDRESS, _LENGTH))
_xxh3_reset: Any = types.ExternalFunction("kvtier_XXH3_64bits_reset", types.int32(_ADDRESS))
_xxh3_update: Any = types.ExternalFunction(
    "kvtier_XXH3_64bits_update", types.int32(_ADDRESS, _ADDRESS, _LENGTH)
)
_xxh3_digest: Any = types.ExternalFunction("kvtier_XXH3_64bits_digest", _LENGTH(_ADDRESS))
_decompress: Any = types.ExternalFunction(
    "kvtier_ZSTD_decompressDCtx", _LENGTH(_ADDRESS, _ADDRESS, _LENGTH, _ADDRESS, _LENGTH)
)
_content_size: Any = types.ExternalFunction("kvtier_ZSTD_getFrameContentSize", _LENGTH(_ADDRESS, _LENGTH))
_copy: Any = types.ExternalFunction("memcpy", _ADDRESS(_ADDRESS, _ADDRESS, _LENGTH))
_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, _ADDRESS, _LENGTH, types.int64))

_IN, _OUT = types.Array(types.uint8, 1, "C", readonly=True), types.Array(types.uint8, 1, "C")
_PLAN = types.Array(types.int64, 2, "C", readonly=True)
_NUMBERS = types.Array(types.int64, 1, "C", readonly=True)
_SIGNATURE = types.boolean(
    *(_ADDRESS, _ADDRESS, _IN, types.int64, types.int64, _IN, _PLAN, _NUMBERS, _IN, _OUT, _OUT)
)


@njit(nogil=True)
def _u32(data: Any, at: int) -> Any:
    return (
        np.int64(data[at])
        | np.int64(data[at + 1]) << 8
        | np.int64(data[at + 2]) << 16
        | np.int64(data[at + 3]) << 24
    )


@njit(nogil=True)
def _u64(data: Any, at: int) -> Any:
    return np.uint64(_u32(data, at)) | np.uint64(_u32(data, at + 4)) << np.uint64(32)


@njit(nogil=True)
def _read(descriptor: int, offset: int, address: Any, length: int) -> bool:
    """Read exactly `length` bytes at an offset of a file."""
    done = 0
    while done < length:
        got = _pread(descriptor, address + done, length - done, offset + done)
        if got <= 0:
            return False
        done += got
    return True


@njit(nogil=True)
def _at_hand(encoded: Any, descriptor: int, offset: int, length: int, room: Any) -> Any:
    """Return stored bytes: those in memory, or in `room` after they have been read there; else nothing."""
    if descriptor < 0:
        return encoded[offset : offset + length]
    if length > room.size or not _read(descriptor, offset, room.ctypes.data, length):
        return room[:0]
    return room[:length]


@njit(nogil=True)
def _table_fits(header: Any, plan: Any, length: int) -> bool:
    """Say whether the table of sections is one that this layout can have, and ends with the block."""
    count = plan.shape[0]
    end = FIXED_BYTES + count * SECTION_BYTES + 8
    for i in range(count):
        at, kind, size = FIXED_BYTES + i * SECTION_BYTES, plan[i, 0], plan[i, 1]
        encoding, offset = _u32(header, at), _u32(header, at + 4)
        stored, raw = _u32(header, at + 8), _u32(header, at + 12)
        if kind in (FRAME, SPLITTABLE):
            allowed = encoding == ZSTD or (kind == SPLITTABLE and encoding == SPLIT)
            fits = allowed and offset == end and raw == size
        else:
            fits = encoding == PLAIN and 0 <= offset - end < MAX_ALIGNMENT and stored == raw
            fits = fits and (raw == size if kind == REST else raw <= size and raw % 4 == 0)
        if not fits:
            return False
        end = offset + stored
    return bool(end == length)


@njit(nogil=True)
def _copy_rest(
    state: Any, encoded: Any, descriptor: int, offset: int, length: int, checksum: Any, out: Any
) -> bool:
    """Fill `out` with what is stored plain, and check it on the way."""
    _xxh3_reset(state)
    for done in range(0, length, PIECE):
        size = min(PIECE, length - done)
        target = out.ctypes.data + done
        if descriptor < 0:
            _copy(target, encoded.ctypes.data + offset + done, size)
        elif not _read(descriptor, offset + done, target, size):
            return False
        _xxh3_update(state, target, size)
    return bool(_xxh3_digest(state) == checksum)


@njit(nogil=True)
def _merge_rest(
    state: Any,
    encoded: Any,
    descriptor: int,
    offset: int,
    checksum: Any,
    numbers: Any,
    room: Any,
    shard: Any,
    out: Any,
) -> bool:
    """Fill a shard's raw bytes from its parts and the rest, a few layers at a time."""
    target, layers, parts, heads = numbers[0], numbers[1], numbers[2], numbers[3]
    tokens, dim, bases_at, nibbles_at = numbers[4], numbers[5], numbers[6], numbers[7]
    pairs, channels = (tokens + 1) // 2, parts * layers * heads * dim
    bases = shard[bases_at : bases_at + channels].reshape((parts, layers, heads, dim))
    nibbles = shard[nibbles_at : nibbles_at + channels * pairs].reshape((parts, layers, heads, pairs, dim))
    rows = tokens if target == TO_BF16 else pairs
    raw = out.reshape((layers, parts, heads, tokens, dim * (2 if target == TO_BF16 else 1)))
    layer_bytes = parts * heads * rows * dim
    at_once = max(1, PIECE // layer_bytes)
    _xxh3_reset(state)
    for first in range(0, layers, at_once):
        last = min(first + at_once, layers)
        size = (last - first) * layer_bytes
        piece = _at_hand(encoded, descriptor, offset + first * layer_bytes, size, room)
        if piece.size != size:
            return False
        _xxh3_update(state, piece.ctypes.data, size)
        rest = piece.reshape((last - first, parts, heads, rows, dim))
        for layer in range(first, last):
            if target == TO_BF16:
                merge_layer_bf16(raw[layer], bases, nibbles, rest[layer - first], layer)
            else:
                merge_layer_e4m3(raw[layer], bases, nibbles, rest[layer - first], layer)
    return bool(_xxh3_digest(state) == checksum)


@compiled(_SIGNATURE)
def decode_block(
    context: Any,
    state: Any,
    encoded: Any,
    descriptor: Any,
    length: Any,
    fixed: Any,
    plan: Any,
    numbers: Any,
    room: Any,
    parts: Any,
    raw: Any,
) -> bool:
    """Verify a block and decode it.

    Args:
        context: Address of a zstd context.
        state: Address of an XXH3 state.
        encoded: The block; nothing, if it is in a file.
        descriptor: The file, or -1.
        length: Bytes of the block.
        fixed: What its header must begin with.
        plan: For each section what it is, its raw length (of a list: at most), and its place in `parts`.
        numbers: Target; layers, K/V, heads, tokens, dim; places of bases, nibbles and escapes in a shard of
            `parts`, and the bytes of such a shard; elements and raw bytes of a shard.
        room: For what is read from the file and what is split: a frame and its header at least. Written to.
        parts: Room for the parts of all shards; for plane slots the slot itself.
        raw: Room for the raw block; nothing for plane slots.

    Returns:
        Whether the block is as it was written. If not, the rooms hold garbage.
    """
    count = plan.shape[0]
    table_end = FIXED_BYTES + count * SECTION_BYTES
    if length < table_end + 8:
        return False
    header = _at_hand(encoded, descriptor, 0, table_end + 8, room)
    if header.size != table_end + 8:
        return False
    for i in range(FIXED_BYTES):
        if header[i] != fixed[i]:
            return False
    if _xxh3(header.ctypes.data, table_end) != _u64(header, table_end):
        return False
    if not _table_fits(header, plan, length):
        return False
    room = room[-(-(table_end + 8) // 64) * 64 :]
    target, escapes_at, stride = numbers[0], numbers[8], numbers[9]
    elements, shard_bytes = numbers[10], numbers[11]
    end, rests = table_end + 8, 0
    for i in range(count):
        at, kind, size, place = FIXED_BYTES + i * SECTION_BYTES, plan[i, 0], plan[i, 1], plan[i, 2]
        encoding, offset, stored = _u32(header, at), _u32(header, at + 4), _u32(header, at + 8)
        checksum = _u64(header, at + 16)
        gap = _at_hand(encoded, descriptor, end, offset - end, room)
        if gap.size != offset - end:
            return False
        for byte in gap:
            if byte != 0:
                return False
        end = offset + stored
        if kind == REST:
            shard = parts[rests * stride : (rests + 1) * stride]
            if target == TO_PLANES:
                out = parts[place : place + size]
                if not _copy_rest(state, encoded, descriptor, offset, size, checksum, out):
                    return False
            else:
                out = raw[rests * shard_bytes : (rests + 1) * shard_bytes]
                if not _merge_rest(state, encoded, descriptor, offset, checksum, numbers, room, shard, out):
                    return False
                listed = shard[escapes_at : escapes_at + 4 * _u32(shard, 0)].view(np.uint32)
                if target == TO_BF16:
                    set_exponents_bf16(out, listed)
                else:
                    set_exponents_e4m3(out, listed)
            rests += 1
            continue
        data = _at_hand(encoded, descriptor, offset, stored, room)
        if data.size != stored or _xxh3(data.ctypes.data, stored) != checksum:
            return False
        if kind == LISTED:
            escapes = parts[place : place + stored]
            escapes[:] = data
            if not escapes_ascend(escapes.view(np.uint32), elements):
                return False
            shard = parts[place - escapes_at : place]
            shard[:HEADER_BYTES] = 0
            shard[:4].view(np.uint32)[0] = stored // 4
        elif encoding == ZSTD:
            if _content_size(data.ctypes.data, stored) != size:
                return False
            if _decompress(context, parts.ctypes.data + place, size, data.ctypes.data, stored) != size:
                return False
        else:
            half = (size + 1) // 2
            if stored < half or stored + half > room.size:
                return False
            frame, high = data[half:], room[room.size - half :]
            if _content_size(frame.ctypes.data, frame.size) != half:
                return False
            if _decompress(context, high.ctypes.data, half, frame.ctypes.data, frame.size) != half:
                return False
            join_halves(data[:half], high, parts[place : place + size])
    return True
