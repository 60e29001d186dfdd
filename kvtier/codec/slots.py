"""The forms that a block may have in the arena's slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from kvtier.codec.format import Bytes
from kvtier.codec.nibbles import NibbleShape, Planes, nibble_shape
from kvtier.layout import BlockLayout

HEADER_BYTES = 16
_ALIGNMENT = 256

Slot = bytes | bytearray | memoryview


class SlotForm(Protocol):
    """How blocks of one layout lie in slots: the shards side by side, each complete in itself.

    Attributes:
        name: "raw" or "planes".
        layout: Of the blocks.
        shard_bytes: Bytes of one shard in a slot.
        slot_bytes: Bytes of a slot.
    """

    name: str
    layout: BlockLayout
    shard_bytes: int

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        ...

    def whole(self, slot: Slot) -> bool:
        """Say whether all shards that were written to a slot fit the form."""
        ...


class RawSlots:
    """Blocks as the engine has them."""

    name = "raw"

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.shard_bytes = layout.shard_bytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.layout.block_bytes

    def whole(self, slot: Slot) -> bool:
        """Say yes: every block fits."""
        return True


class PlaneSlots:
    """Blocks taken apart, in about 0.78 of their bytes. Specified in `docs/format.md`.

    Attributes:
        shape: Geometry of a shard.
        escapes_at: Offset of the escapes in a shard's bytes.
        bases_at: Offset of the bases.
        nibbles_at: Offset of the nibbles.
        rest_at: Offset of the rest.
    """

    name = "planes"

    def __init__(self, shape: NibbleShape) -> None:
        self.layout = shape.layout
        self.shape = shape
        self.escapes_at = HEADER_BYTES
        self.bases_at = _aligned(self.escapes_at + 4 * shape.max_escapes)
        self.nibbles_at = _aligned(self.bases_at + shape.base_bytes)
        self.rest_at = _aligned(self.nibbles_at + shape.nibble_bytes)
        self.shard_bytes = _aligned(self.rest_at + shape.rest_bytes)

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot."""
        return self.layout.shards * self.shard_bytes

    def whole(self, slot: Slot) -> bool:
        """Say whether no shard in a slot has more escapes than there is room for."""
        return all(planes.fits for planes in self.planes(slot))

    def planes(self, slot: Slot) -> list[Planes]:
        """Return views of the shards in a slot, with the counts that stand there.

        Raises:
            ValueError: `slot` has another length than `slot_bytes`.
        """
        return [self.shard(shard) for shard in self._shards(slot)]

    def shard(self, data: Bytes) -> Planes:
        """Return views of one shard's `shard_bytes`, with the count that stands there."""
        shape = self.shape
        escapes = data[self.escapes_at : self.escapes_at + 4 * shape.max_escapes].view(np.uint32)
        return Planes(
            data[self.bases_at : self.bases_at + shape.base_bytes].reshape(shape.bases),
            data[self.nibbles_at : self.nibbles_at + shape.nibble_bytes].reshape(shape.nibbles),
            data[self.rest_at : self.rest_at + shape.rest_bytes].reshape(shape.rest),
            escapes,
            int(data[:4].view(np.uint32)[0]),
        )

    def note(self, data: Bytes, planes: Planes) -> None:
        """Write how many escapes a shard has, which makes it complete."""
        data[:HEADER_BYTES] = 0
        data[:4].view(np.uint32)[0] = planes.count

    def complete(self, slot: Slot, shards: Sequence[Planes]) -> None:
        """Write how many escapes the shards in a slot have."""
        for data, planes in zip(self._shards(slot), shards, strict=True):
            self.note(data, planes)

    def split_shard(self, raw: Bytes, data: Bytes) -> None:
        """Take one shard apart into its `shard_bytes`; it fits if the count that stands there then does."""
        planes = self.shard(data)
        self.shape.split(raw, planes)
        self.note(data, planes)

    def split(self, raw: Bytes, slot: Slot) -> None:
        """Take a whole block apart into a slot; see `whole` for whether it fits."""
        for part, shard in zip(raw.reshape(self.layout.shards, -1), self._shards(slot), strict=True):
            self.split_shard(part, shard)

    def merge(self, slot: Slot, raw: Bytes) -> None:
        """Put a whole block together from a slot."""
        for part, planes in zip(raw.reshape(self.layout.shards, -1), self.planes(slot), strict=True):
            self.shape.merge(planes, part)

    def _shards(self, slot: Slot) -> Bytes:
        data = np.frombuffer(slot, np.uint8)
        if data.size != self.slot_bytes:
            raise ValueError(f"a slot has {self.slot_bytes} bytes, got {data.size}")
        return data.reshape(self.layout.shards, self.shard_bytes)


def slot_form(layout: BlockLayout, name: str = "raw") -> SlotForm:
    """Return the form that blocks of a layout have where `name` is configured.

    "planes" gains memory and bus for bfloat16 alone (float8 would take 1.02 of its bytes), and needs to know
    the head's size; everything else lies raw in its slots.
    """
    shape = nibble_shape(layout) if name == "planes" and layout.dtype == "bfloat16" else None
    return PlaneSlots(shape) if shape is not None else RawSlots(layout)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
