"""Shards of blocks as exponent nibbles and the rest: their geometry, and taking them apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kvtier.codec.format import Bytes, Words
from kvtier.layout import ITEM_BYTES, BlockLayout

MAX_ELEMENTS = 1 << 24
"""Elements of a shard at most: an escape has 24 bits for its place."""

ESCAPE_SHARE = 200
"""One escape for so many elements is allowed; real KV in bfloat16 has one in 4,000."""


@dataclass(slots=True)
class Planes:
    """One shard, taken apart; see `nibble_kernels` for shapes and meaning.

    Attributes:
        bases: Largest exponent of each channel.
        nibbles: Distances to it.
        rest: Sign and mantissa.
        escapes: Room for all escapes that are allowed.
        count: How many there are; the block does not fit when it is more than the room.
    """

    bases: Bytes
    nibbles: Bytes
    rest: Bytes
    escapes: Words
    count: int = 0

    @property
    def fits(self) -> bool:
        """Whether all escapes have found room."""
        return self.count <= self.escapes.size


@dataclass(frozen=True, slots=True)
class NibbleShape:
    """The geometry of one shard of a layout. Made by `nibble_shape`.

    Attributes:
        layout: Of the block.
        raw: Shape of the shard's bytes.
        bases: Shape of the bases.
        nibbles: Shape of the nibbles.
        rest: Shape of the rest.
        elements: Elements of the shard.
        max_escapes: Escapes that it may have.
        kernels: What takes shards of this dtype apart, and what puts them together.
    """

    layout: BlockLayout
    raw: tuple[int, ...]
    bases: tuple[int, ...]
    nibbles: tuple[int, ...]
    rest: tuple[int, ...]
    elements: int
    max_escapes: int
    kernels: tuple[Callable[..., int], Callable[..., None]] = field(repr=False)

    @property
    def base_bytes(self) -> int:
        """Bytes of the bases."""
        return math.prod(self.bases)

    @property
    def nibble_bytes(self) -> int:
        """Bytes of the nibbles."""
        return math.prod(self.nibbles)

    @property
    def rest_bytes(self) -> int:
        """Bytes of the rest."""
        return math.prod(self.rest)

    def room(self) -> Planes:
        """Return room for one shard."""
        return Planes(
            np.empty(self.bases, np.uint8),
            np.empty(self.nibbles, np.uint8),
            np.empty(self.rest, np.uint8),
            np.empty(self.max_escapes, np.uint32),
        )

    def split(self, raw: Bytes, planes: Planes) -> None:
        """Take a shard apart, `raw` being its bytes in any shape."""
        split, _ = self.kernels
        planes.count = split(raw.reshape(self.raw), planes.bases, planes.nibbles, planes.rest, planes.escapes)

    def merge(self, planes: Planes, raw: Bytes) -> None:
        """Put a shard together again; escapes outside of it do nothing.

        Args:
            planes: The shard.
            raw: Contiguous room for its bytes, of any shape.
        """
        _, merge = self.kernels
        merge(
            raw.reshape(self.raw), planes.bases, planes.nibbles, planes.rest, planes.escapes[: planes.count]
        )


def nibble_shape(layout: BlockLayout) -> NibbleShape | None:
    """Return the geometry of a layout's shards, None where its elements cannot be taken apart like this.

    That is so for other dtypes than bfloat16 and float8_e4m3fn, where it is not known which elements are of
    one channel, and for shards of more than `MAX_ELEMENTS`.
    """
    elements = layout.shard_bytes // ITEM_BYTES[layout.dtype]
    if layout.dtype not in ("bfloat16", "float8_e4m3fn") or not layout.head_dim or elements > MAX_ELEMENTS:
        return None
    # Not before a shape is wanted: an engine whose blocks an agent encodes and decodes needs no numba.
    from kvtier.codec import nibble_kernels as kernels

    tokens, dim = layout.tokens_per_block, layout.head_dim
    pairs, heads = (tokens + 1) // 2, layout.row_elements // (tokens * dim)
    rows, channels = (layout.layers, layout.kv_factor, heads), (layout.kv_factor, layout.layers, heads)
    return NibbleShape(
        layout,
        raw=(*rows, tokens, dim * ITEM_BYTES[layout.dtype]),
        bases=(*channels, dim),
        nibbles=(*channels, pairs, dim),
        rest=(*rows, tokens if layout.dtype == "bfloat16" else pairs, dim),
        elements=elements,
        max_escapes=max(1, elements // ESCAPE_SHARE),
        kernels=(kernels.split_bf16, kernels.merge_bf16)
        if layout.dtype == "bfloat16"
        else (kernels.split_e4m3, kernels.merge_e4m3),
    )
