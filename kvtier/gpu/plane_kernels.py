"""Triton kernels that take bfloat16 blocks apart into slots of planes, and put them together again.

They do what `kvtier.codec.nibble_kernels` does on the CPU; its docstring explains bases, nibbles and escapes,
`docs/format.md` the bytes of a slot. One launch serves many blocks. Slots lie `slot_stride` bytes apart from
`slots` on; block b begins `offsets[b]` elements after `anchor`, a multiple of 8, wherever that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

ESCAPE = tl.constexpr(15)


@triton.jit  # type: ignore[untyped-decorator]
def merge(  # type: ignore[no-untyped-def]
    slots,
    slot_stride,
    anchor,
    offsets,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    BASES: tl.constexpr,
    NIBBLES: tl.constexpr,
    REST: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Fill blocks but for their escapes. Grid: (spans of nibble bytes, blocks)."""
    pairs: tl.constexpr = (TOKENS + 1) // 2
    slot = slots + tl.program_id(1).to(tl.int64) * slot_stride
    block = anchor.to(tl.pointer_type(tl.int16)) + tl.multiple_of(tl.load(offsets + tl.program_id(1)), 8)
    at = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    valid = at < LAYERS * PARTS * HEADS * pairs * DIM
    d, row = at % DIM, at // DIM
    token, channel = 2 * (row % pairs), row // pairs
    head, layer, part = channel % HEADS, channel // HEADS % LAYERS, channel // (HEADS * LAYERS)
    first = (((layer * PARTS + part) * HEADS + head) * TOKENS + token) * DIM + d
    second = first + DIM
    paired = valid & (token + 1 < TOKENS)
    base = tl.load(slot + BASES + channel * DIM + d, valid, 0).to(tl.int32)
    nibble = tl.load(slot + NIBBLES + at, valid, 0).to(tl.int32)
    low = tl.load(slot + REST + first, valid, 0).to(tl.int32)
    value = (low & 0x80) << 8 | ((base - (nibble & 15)) & 0xFF) << 7 | low & 0x7F
    tl.store(block + first, value.to(tl.int16), valid)
    low = tl.load(slot + REST + second, paired, 0).to(tl.int32)
    value = (low & 0x80) << 8 | ((base - (nibble >> 4)) & 0xFF) << 7 | low & 0x7F
    tl.store(block + second, value.to(tl.int16), paired)


@triton.jit  # type: ignore[untyped-decorator]
def merge_escapes(  # type: ignore[no-untyped-def]
    slots,
    slot_stride,
    anchor,
    offsets,
    ELEMENTS: tl.constexpr,
    MAX_ESCAPES: tl.constexpr,
    ESCAPES: tl.constexpr,
    REST: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Fill in the escapes, after `merge`. Grid: (spans of the room for escapes, blocks)."""
    slot = slots + tl.program_id(1).to(tl.int64) * slot_stride
    block = anchor.to(tl.pointer_type(tl.int16)) + tl.load(offsets + tl.program_id(1))
    count = tl.minimum(tl.load(slot.to(tl.pointer_type(tl.int32))), MAX_ESCAPES)
    at = tl.program_id(0) * SPAN + tl.arange(0, SPAN)
    entry = tl.load((slot + ESCAPES).to(tl.pointer_type(tl.int32)) + at, at < count, 0)
    place = (entry >> 8) & 0xFFFFFF
    listed = (at < count) & (place < ELEMENTS)
    low = tl.load(slot + REST + place, listed, 0).to(tl.int32)
    value = (low & 0x80) << 8 | (entry & 0xFF) << 7 | low & 0x7F
    tl.store(block + place, value.to(tl.int16), listed)


@triton.jit  # type: ignore[untyped-decorator]
def split(  # type: ignore[no-untyped-def]
    slots,
    slot_stride,
    anchor,
    offsets,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    MAX_ESCAPES: tl.constexpr,
    ESCAPES: tl.constexpr,
    BASES: tl.constexpr,
    NIBBLES: tl.constexpr,
    REST: tl.constexpr,
    PAIRS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Fill slots whose counts of escapes are zero. Grid: (heads of all rows · spans of channels, blocks).

    Escapes beyond the room are counted and not written. PAIRS is the power of two that holds all pairs.
    """
    pairs: tl.constexpr = (TOKENS + 1) // 2
    spans: tl.constexpr = (DIM + SPAN - 1) // SPAN
    slot = slots + tl.program_id(1).to(tl.int64) * slot_stride
    block = anchor.to(tl.pointer_type(tl.int16)) + tl.multiple_of(tl.load(offsets + tl.program_id(1)), 8)
    row = tl.program_id(0) // spans
    head, part, layer = row % HEADS, row // HEADS % PARTS, row // (HEADS * PARTS)
    channel = (part * LAYERS + layer) * HEADS + head
    d = tl.program_id(0) % spans * SPAN + tl.arange(0, SPAN)
    pair = tl.arange(0, PAIRS)
    inside = (d < DIM)[None, :] & (pair < pairs)[:, None]
    paired = inside & (2 * pair + 1 < TOKENS)[:, None]
    first = (row * TOKENS + 2 * pair[:, None]) * DIM + d[None, :]
    second = first + DIM
    x = tl.load(block + first, inside, 0).to(tl.int32)
    y = tl.load(block + second, paired, 0).to(tl.int32)
    tl.store(slot + REST + first, (x >> 8 & 0x80 | x & 0x7F).to(tl.uint8), inside)
    tl.store(slot + REST + second, (y >> 8 & 0x80 | y & 0x7F).to(tl.uint8), paired)
    x, y = x >> 7 & 0xFF, y >> 7 & 0xFF
    base = tl.maximum(tl.max(x, 0), tl.max(y, 0))
    tl.store(slot + BASES + channel * DIM + d, base.to(tl.uint8), d < DIM)
    nibble = tl.minimum(base[None, :] - x, ESCAPE)
    other = tl.where(paired, tl.minimum(base[None, :] - y, ESCAPE), 0)
    at = (channel * pairs + pair[:, None]) * DIM + d[None, :]
    tl.store(slot + NIBBLES + at, (nibble | other << 4).to(tl.uint8), inside)
    count = slot.to(tl.pointer_type(tl.int32))
    entries = (slot + ESCAPES).to(tl.pointer_type(tl.int32))
    nibble = tl.where(inside, nibble, 0)
    if tl.max(tl.max(tl.maximum(nibble, other), 1), 0) == ESCAPE:
        listed = nibble == ESCAPE
        place = tl.atomic_add(count + tl.zeros_like(x), 1, listed)
        tl.store(entries + place, first << 8 | x, listed & (place < MAX_ESCAPES))
        listed = other == ESCAPE
        place = tl.atomic_add(count + tl.zeros_like(y), 1, listed)
        tl.store(entries + place, second << 8 | y, listed & (place < MAX_ESCAPES))
