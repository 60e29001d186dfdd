"""Blocks taken apart and put together on the GPU, many with one launch."""

from __future__ import annotations

import math

import torch

from kvtier.codec.slots import HEADER_BYTES, PlaneSlots
from kvtier.gpu import plane_kernels as kernels

_SPAN = 2048
_MERGE_WARPS = 4
_CHANNELS = 64
_SPLIT_WARPS = 1
"""The fastest of those tried on an H100: 990 GB/s of KV merged, 540 split."""


class GpuPlanes:
    """Launches the kernels for one form of slots, on the current stream. Never waits.

    Both directions work on shards as they lie in slots, `form.shard_bytes` each, one after the other in the
    GPU's memory, and on blocks at any addresses that are multiples of 16.
    """

    def __init__(self, form: PlaneSlots) -> None:
        self.form = form
        shape = form.shape
        layers, parts, heads, tokens, _ = shape.raw
        dim, pairs = shape.nibbles[4], shape.nibbles[3]
        self._geometry = (layers, parts, heads, tokens, dim)
        self._escapes = (shape.max_escapes, form.escapes_at)
        self._planes = (form.bases_at, form.nibbles_at, form.rest_at)
        self._merge_spans = -(-shape.nibble_bytes // _SPAN)
        self._escape_spans = -(-shape.max_escapes // _SPAN)
        self._pairs = _power_of_two(pairs)
        self._channels = min(_CHANNELS, _power_of_two(dim))
        self._split_spans = math.prod((layers, parts, heads)) * -(-dim // self._channels)

    def merge(self, slots: torch.Tensor, anchor: torch.Tensor, offsets: torch.Tensor) -> None:
        """Put blocks together.

        Args:
            slots: Shards, uint8 `[blocks, form.shard_bytes]`, contiguous.
            anchor: Any uint8 tensor of this GPU whose address is a multiple of 16.
            offsets: Where each block begins, int64 `[blocks]`, in 2 bytes from the anchor, multiples of 8.
        """
        blocks, stride = slots.shape
        where = (slots, stride, anchor, offsets)
        kernels.merge[(self._merge_spans, blocks)](
            *where, *self._geometry, *self._planes, _SPAN, num_warps=_MERGE_WARPS
        )
        shape, (room, escapes_at) = self.form.shape, self._escapes
        kernels.merge_escapes[(self._escape_spans, blocks)](
            *where, shape.elements, room, escapes_at, self.form.rest_at, _SPAN, num_warps=_MERGE_WARPS
        )

    def split(self, slots: torch.Tensor, anchor: torch.Tensor, offsets: torch.Tensor) -> None:
        """Take blocks apart; arguments as of `merge`."""
        blocks, stride = slots.shape
        slots[:, :HEADER_BYTES].zero_()
        kernels.split[(self._split_spans, blocks)](
            *(slots, stride, anchor, offsets),
            *self._geometry,
            *self._escapes,
            *self._planes,
            self._pairs,
            self._channels,
            num_warps=_SPLIT_WARPS,
        )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
