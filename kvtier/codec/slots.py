"""The forms that a block may have in the arena's slots."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kvtier.codec.kernels import Bytes
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
        data = np.frombuffer(slot, np.uint8)
        if data.size != self.slot_bytes:
            raise ValueError(f"a slot has {self.slot_bytes} bytes, got {data.size}")
        return [self._view(shard) for shard in data.reshape(self.layout.shards, self.shard_bytes)]

    def note(self, planes: Planes, slot: memoryview, shard: int) -> None:
        """Write the count of a shard's escapes, which makes it complete."""
        at = shard * self.shard_bytes
        slot[at : at + HEADER_BYTES] = planes.count.to_bytes(HEADER_BYTES, "little")

    def split(self, raw: Bytes, slot: memoryview) -> None:
        """Take a whole block apart into a slot; see `whole` for whether it fits."""
        for shard, (part, planes) in enumerate(
            zip(raw.reshape(self.layout.shards, -1), self.planes(slot), strict=True)
        ):
            self.shape.split(part, planes)
            self.note(planes, slot, shard)

    def merge(self, slot: Slot, raw: Bytes) -> None:
        """Put a whole block together from a slot whose escapes have been checked."""
        for part, planes in zip(raw.reshape(self.layout.shards, -1), self.planes(slot), strict=True):
            self.shape.merge(planes, part)

    def _view(self, shard: Bytes) -> Planes:
        shape = self.shape
        escapes = shard[self.escapes_at : self.escapes_at + 4 * shape.max_escapes].view(np.uint32)
        return Planes(
            shard[self.bases_at : self.bases_at + shape.base_bytes].reshape(shape.bases),
            shard[self.nibbles_at : self.nibbles_at + shape.nibble_bytes].reshape(shape.nibbles),
            shard[self.rest_at : self.rest_at + shape.rest_bytes].reshape(shape.rest),
            escapes,
            int(shard[:4].view(np.uint32)[0]),
        )


def slot_form(layout: BlockLayout, name: str = "raw") -> SlotForm:
    """Return the form that blocks of a layout have where `name` is configured.

    "planes" gains memory and bus for bfloat16 alone (float8 would take 1.02 of its bytes), and needs to know
    the head's size; everything else lies raw in its slots.
    """
    shape = nibble_shape(layout) if name == "planes" and layout.dtype == "bfloat16" else None
    return PlaneSlots(shape) if shape is not None else RawSlots(layout)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
