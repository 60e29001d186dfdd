"""The description of a KV pool by layer group, as main's second cache manager hands it to a connector."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class BufferRef:
    """One layer's keys or values inside a region, in memory order."""

    layer_id: int
    role: str
    expansion: int = 1


@dataclass(frozen=True)
class Region:
    """A byte range that repeats once per page slot: `size` bytes at `base + stride * slot`."""

    base: int
    size: int
    stride: int
    num_slots: int
    buffers: tuple[BufferRef, ...]
    storage: torch.Tensor = field(repr=False, compare=False)

    def address_of(self, slot_id: int) -> int:
        """Return the address of one slot.

        Raises:
            IndexError: There is no such slot; -1, "no page", is none.
        """
        if not 0 <= slot_id < self.num_slots:
            raise IndexError(f"slot_id {slot_id} out of range [0, {self.num_slots})")
        return self.base + self.stride * slot_id

    def as_tensor(self, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        """Return a strided view `[num_slots, size // itemsize]`; row i is slot i."""
        if self.size % dtype.itemsize or self.stride % dtype.itemsize:
            raise ValueError(f"size {self.size} and stride {self.stride} are not multiples of {dtype}")
        typed = self.storage.view(dtype)
        return typed.as_strided(
            (self.num_slots, self.size // dtype.itemsize),
            (self.stride // dtype.itemsize, 1),
            (self.base - self.storage.data_ptr()) // dtype.itemsize,
        )


@dataclass(frozen=True)
class LayerGroupLayout:
    """The layers that share one page-index space."""

    layer_group_id: int
    layer_ids: tuple[int, ...]
    window_size: int | None
    regions: tuple[Region, ...]
    replicated_regions: tuple[Region, ...] = ()

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all its regions."""
        return sum(region.size for region in self.regions)


@dataclass(frozen=True)
class KvCacheLayout:
    """Every layer group of a pool."""

    tokens_per_block: int
    groups: tuple[LayerGroupLayout, ...]
    gpu_pool_mapping_bytes: int | None = None
    single: torch.Tensor | None = field(default=None, repr=False, compare=False)

    def group(self, layer_group_id: int) -> LayerGroupLayout:
        """Return one group.

        Raises:
            KeyError: There is no such group.
        """
        for group in self.groups:
            if group.layer_group_id == layer_group_id:
                return group
        raise KeyError(f"no layer group {layer_group_id}")

    def as_single_pool_tensor(self) -> torch.Tensor | None:
        """Return the pool in the flat form, where one dense tensor describes it; else None."""
        return self.single
