"""Compiled loops that take a shard apart into exponent nibbles and the rest, and join them again.

A channel is one place in one head: its elements, one a token, have exponents that lie close together. Each is
stored as the distance to the channel's largest one (the base), 4 bits, two tokens in a byte. A distance of 15
and more is an *escape*: the nibble is 15, and the exponent stands in a list.

All arrays are C-contiguous bytes, at any address, and the kernels hold no GIL:

    raw: `[layers, kv_factor, heads, tokens, bytes of a head]`, one shard of a block.
    bases: `[kv_factor, layers, heads, dim]`, the largest exponent of each channel.
    nibbles: `[kv_factor, layers, heads, pairs, dim]`; the low nibble is of token 2 pair, the high one of the
        next, or 0 where there is none.
    rest: sign and mantissa of each element, in the order of the block: a byte each for bfloat16
        (`[layers, kv_factor, heads, tokens, dim]`), a nibble each for float8_e4m3fn, paired as above
        (`[layers, kv_factor, heads, pairs, dim]`).
    escapes: u32 entries, `place << 8 | exponent`; place counts the elements of `raw`.
"""

from __future__ import annotations

import numpy as np
from numba import types

from kvtier.codec.format import Bytes, Words
from kvtier.codec.kernels import compiled

ESCAPE = 15
"""The nibble of an element whose exponent stands in the list."""

_OUT5, _OUT4 = types.Array(types.uint8, 5, "C"), types.Array(types.uint8, 4, "C")
_IN5, _IN4 = types.Array(types.uint8, 5, "C", readonly=True), types.Array(types.uint8, 4, "C", readonly=True)
_OUT_WORDS, _IN_WORDS = types.Array(types.uint32, 1, "C"), types.Array(types.uint32, 1, "C", readonly=True)
_SPLIT = types.int64(_IN5, _OUT4, _OUT5, _OUT5, _OUT_WORDS)
_MERGE = types.void(_OUT5, _IN4, _IN5, _IN5, _IN_WORDS)
_MERGE_LAYER = types.void(_OUT4, _IN4, _IN5, _IN4, types.int64)
_SET = types.void(types.Array(types.uint8, 1, "C"), _IN_WORDS)
_CHECK = types.boolean(_IN_WORDS, types.int64)


@compiled(_SPLIT)
def split_bf16(raw: Bytes, bases: Bytes, nibbles: Bytes, rest: Bytes, escapes: Words) -> int:
    """Take a bfloat16 shard apart.

    Returns:
        The number of escapes; those beyond the room in `escapes` are counted but not written.
    """
    layers, parts, heads, tokens, _ = raw.shape
    dim, count = bases.shape[3], 0
    for layer in range(layers):
        for part in range(parts):
            for head in range(heads):
                base = bases[part, layer, head]
                base[:] = 0
                for token in range(tokens):
                    x, low = raw[layer, part, head, token], rest[layer, part, head, token]
                    for d in range(dim):
                        exponent = np.uint8(x[2 * d + 1] << 1 | x[2 * d] >> 7)
                        base[d] = max(base[d], exponent)
                        low[d] = x[2 * d] & 0x7F | x[2 * d + 1] & 0x80
                for pair in range(nibbles.shape[3]):
                    nibble = nibbles[part, layer, head, pair]
                    worst = np.uint8(0)
                    x = raw[layer, part, head, 2 * pair]
                    for d in range(dim):
                        distance = np.uint8(base[d] - np.uint8(x[2 * d + 1] << 1 | x[2 * d] >> 7))
                        worst = max(worst, distance)
                        nibble[d] = min(distance, np.uint8(ESCAPE))
                    if 2 * pair + 1 < tokens:
                        y = raw[layer, part, head, 2 * pair + 1]
                        for d in range(dim):
                            distance = np.uint8(base[d] - np.uint8(y[2 * d + 1] << 1 | y[2 * d] >> 7))
                            worst = max(worst, distance)
                            nibble[d] |= min(distance, np.uint8(ESCAPE)) << 4
                    if worst < ESCAPE:
                        continue
                    for token in range(2 * pair, min(2 * pair + 2, tokens)):
                        z = raw[layer, part, head, token]
                        place = (((layer * parts + part) * heads + head) * tokens + token) * dim
                        for d in range(dim):
                            exponent = np.uint8(z[2 * d + 1] << 1 | z[2 * d] >> 7)
                            if base[d] - exponent >= ESCAPE:
                                if count < escapes.size:
                                    escapes[count] = (place + d) << 8 | exponent
                                count += 1
    return count


@compiled(_SET)
def set_exponents_bf16(raw: Bytes, escapes: Words) -> None:
    """Give the elements of a bfloat16 shard that have escapes their exponents; others' places do nothing."""
    for entry in escapes:
        place, exponent = np.int64(entry >> 8), np.uint8(entry)
        if 2 * place < raw.size:
            raw[2 * place] = raw[2 * place] & 0x7F | exponent << 7
            raw[2 * place + 1] = raw[2 * place + 1] & 0x80 | exponent >> 1


@compiled(_SET)
def set_exponents_e4m3(raw: Bytes, escapes: Words) -> None:
    """Give the elements of a float8_e4m3fn shard that have escapes their exponents."""
    for entry in escapes:
        place = np.int64(entry >> 8)
        if place < raw.size:
            raw[place] = raw[place] & 0x87 | (np.uint8(entry) & 0x0F) << 3


@compiled(_MERGE_LAYER)
def merge_layer_bf16(raw: Bytes, bases: Bytes, nibbles: Bytes, rest: Bytes, layer: int) -> None:
    """Fill one layer of `raw` from what `split_bf16` made of it, but for its escapes.

    Args:
        raw: The layer, `[kv_factor, heads, tokens, bytes of a head]`.
        bases: Of all layers.
        nibbles: Of all layers.
        rest: Of this layer, `[kv_factor, heads, tokens, dim]`.
        layer: Which it is.
    """
    parts, heads, tokens, dim = rest.shape
    for part in range(parts):
        for head in range(heads):
            base = bases[part, layer, head]
            for pair in range(nibbles.shape[3]):
                nibble = nibbles[part, layer, head, pair]
                x, low = raw[part, head, 2 * pair], rest[part, head, 2 * pair]
                for d in range(dim):
                    exponent = np.uint8(base[d] - (nibble[d] & ESCAPE))
                    x[2 * d] = low[d] & 0x7F | exponent << 7
                    x[2 * d + 1] = low[d] & 0x80 | exponent >> 1
                if 2 * pair + 1 < tokens:
                    y, low = raw[part, head, 2 * pair + 1], rest[part, head, 2 * pair + 1]
                    for d in range(dim):
                        exponent = np.uint8(base[d] - (nibble[d] >> 4))
                        y[2 * d] = low[d] & 0x7F | exponent << 7
                        y[2 * d + 1] = low[d] & 0x80 | exponent >> 1


@compiled(_MERGE)
def merge_bf16(raw: Bytes, bases: Bytes, nibbles: Bytes, rest: Bytes, escapes: Words) -> None:
    """Fill `raw` from what `split_bf16` made of it; of `escapes` those outside of the shard do nothing."""
    for layer in range(raw.shape[0]):
        merge_layer_bf16(raw[layer], bases, nibbles, rest[layer], layer)
    set_exponents_bf16(raw.reshape(-1), escapes)


@compiled(_SPLIT)
def split_e4m3(raw: Bytes, bases: Bytes, nibbles: Bytes, rest: Bytes, escapes: Words) -> int:
    """Take a float8_e4m3fn shard apart; see `split_bf16`."""
    layers, parts, heads, tokens, dim = raw.shape
    count = 0
    for layer in range(layers):
        for part in range(parts):
            for head in range(heads):
                base = bases[part, layer, head]
                base[:] = 0
                for token in range(tokens):
                    x = raw[layer, part, head, token]
                    for d in range(dim):
                        base[d] = max(base[d], np.uint8(x[d] >> 3 & 0x0F))
                for pair in range(nibbles.shape[3]):
                    nibble, low = nibbles[part, layer, head, pair], rest[layer, part, head, pair]
                    worst = np.uint8(0)
                    x = raw[layer, part, head, 2 * pair]
                    for d in range(dim):
                        distance = np.uint8(base[d] - (x[d] >> 3 & 0x0F))
                        worst = max(worst, distance)
                        nibble[d] = distance
                        low[d] = np.uint8(x[d] & 0x07 | x[d] >> 4 & 0x08)
                    if 2 * pair + 1 < tokens:
                        y = raw[layer, part, head, 2 * pair + 1]
                        for d in range(dim):
                            distance = np.uint8(base[d] - (y[d] >> 3 & 0x0F))
                            worst = max(worst, distance)
                            nibble[d] |= np.uint8(distance << 4)
                            low[d] |= np.uint8(y[d] << 4 & 0x70 | y[d] & 0x80)
                    if worst < ESCAPE:
                        continue
                    for token in range(2 * pair, min(2 * pair + 2, tokens)):
                        z = raw[layer, part, head, token]
                        place = (((layer * parts + part) * heads + head) * tokens + token) * dim
                        for d in range(dim):
                            exponent = z[d] >> 3 & 0x0F
                            if base[d] - exponent >= ESCAPE:
                                if count < escapes.size:
                                    escapes[count] = (place + d) << 8 | exponent
                                count += 1
    return count


@compiled(_MERGE_LAYER)
def merge_layer_e4m3(raw: Bytes, bases: Bytes, nibbles: Bytes, rest: Bytes, layer: int) -> None:
    """Fill one layer of `raw` from what `split_e4m3` made of it, but for its escapes.

    See `merge_layer_bf16`; `rest` is `[kv_factor, heads, pairs, dim]`.
    """
    parts, heads, tokens, dim = raw.shape
    for part in range(parts):
        for head in range(heads):
            base = bases[part, layer, head]
            for pair in range(nibbles.shape[3]):
                nibble, low = nibbles[part, layer, head, pair], rest[part, head, pair]
                x = raw[part, head, 2 * pair]
                for d in range(dim):
                    exponent = np.uint8(base[d] - (nibble[d] & 0x0F))
                    x[d] = np.uint8(low[d] & 0x07 | (low[d] & 0x08) << 4 | exponent << 3 & 0x78)
                if 2 * pair + 1 < tokens:
                    y = raw[part, head, 2 * pair + 1]
                    for d in range(dim):
                        exponent = np.uint8(base[d] - (nibble[d] >> 4))
                        y[d] = np.uint8(low[d] >> 4 & 0x07 | low[d] & 0x80 | exponent << 3 & 0x78)


@compiled(_MERGE)
def merge_e4m3(raw: Bytes, bases: Bytes, nibbles: Bytes, rest: Bytes, escapes: Words) -> None:
    """Fill `raw` from what `split_e4m3` made of it; see `merge_bf16`."""
    for layer in range(raw.shape[0]):
        merge_layer_e4m3(raw[layer], bases, nibbles, rest[layer], layer)
    set_exponents_e4m3(raw.reshape(-1), escapes)


@compiled(_CHECK)
def escapes_ascend(escapes: Words, elements: int) -> bool:
    """Say whether the places of all escapes are below `elements` and each is above the one before."""
    before = -1
    for entry in escapes:
        place = np.int64(entry >> 8)
        if place <= before:
            return False
        before = place
    return before < elements
