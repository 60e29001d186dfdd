"""Movers of blocks between plane slots and a pool: put together on the way in, taken apart on the way out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.codec import PlaneSlots
from kvtier.gpu.copies import Addresses, Copy, copy_on_host
from kvtier.gpu.ranges import PageMap

STAGING_BYTES = 64 << 20
"""Memory of the GPU that each direction takes for slots. A batch of so much is copied in a millisecond."""

ALIGNMENT = 16
"""Blocks at other addresses, and those in several pieces, are put together in memory of the mover first."""

Blocks = tuple[NDArray[np.uint64], Sequence[Sequence[int]]]
"""Address of each block's slot, and its pages."""


class _Room(NamedTuple):
    """Memory of the GPU for the blocks of one batch.

    Attributes:
        slots: Slots, uint8 `[blocks, bytes]`.
        raw: Blocks as the pool has them, uint8 `[blocks, bytes]`; without bytes where they are not needed.
        places: Where the kernels find the blocks, in `raw` or in the pool.
    """

    slots: torch.Tensor
    raw: torch.Tensor
    places: torch.Tensor

    def first(self, blocks: int) -> _Room:
        """Return the room of the first blocks."""
        return _Room(self.slots[:blocks], self.raw[:blocks], self.places[:blocks])


class HostPlanes:
    """Moves blocks of a pool in host memory; everything is over when a call returns."""

    def __init__(self, form: PlaneSlots, pool_map: PageMap) -> None:
        self._form = form
        self._map = pool_map

    def load(self, blocks: Blocks, stream: int) -> None:
        """Put blocks together in their pages; where blocks may lack pages, -1 is skipped.

        Raises:
            IndexError: A page that the pool does not have.
        """
        raw = np.empty(self._map.block_bytes, np.uint8)
        for slot, pages in zip(*blocks, strict=True):
            self._form.shape.merge(self._form.shard(self._bytes(slot)), raw)
            pool, host, sizes = self._map.ranges(_address_of(raw), [pages], whole=False)
            copy_on_host(pool, host, sizes, 0)

    def save(self, blocks: Blocks, stream: int) -> None:
        """Take blocks in pages apart.

        Raises:
            IndexError: A page that the pool does not have.
        """
        raw = np.empty(self._map.block_bytes, np.uint8)
        for slot, pages in zip(*blocks, strict=True):
            pool, host, sizes = self._map.ranges(_address_of(raw), [pages])
            copy_on_host(host, pool, sizes, 0)
            self._form.split_shard(raw, self._bytes(slot))

    def _bytes(self, address: np.uint64) -> NDArray[np.uint8]:
        kind = ctypes.c_uint8 * self._form.shard_bytes
        return np.frombuffer(memoryview(kind.from_address(int(address))), np.uint8)


class CudaPlanes:
    """Moves blocks of a pool on a GPU, on a stream of the caller's. Nothing waits for the GPU.

    Slots are copied to the GPU in batches, whose blocks the kernels put together in the pool; the other way
    round for saves. Where a block is no single range of the pool, its parts are copied to and from the
    mover's own memory.
    """

    def __init__(self, form: PlaneSlots, pool_map: PageMap, copy: Copy, device: torch.device) -> None:
        """Take memory of the GPU, and compile the kernels. Waits for the GPU.

        Args:
            form: Form of the slots.
            pool_map: Where blocks lie in the pool.
            copy: Copies ranges.
            device: The GPU.

        Raises:
            ImportError: Triton is not installed.
            Exception: It cannot compile here.
        """
        # Only machines with a GPU have Triton.
        from kvtier.gpu.planes import GpuPlanes

        self._form = form
        self._map = pool_map
        self._copy = copy
        self._device = device
        self._planes = GpuPlanes(form)
        self._plain = pool_map.is_plain(ALIGNMENT)
        self._batch = max(1, STAGING_BYTES // form.shard_bytes)
        with torch.cuda.device(device):
            self._loads, self._saves = self._room(), self._room()
            self._warm_up()

    def load(self, blocks: Blocks, stream: int) -> None:
        """Put blocks together in their pages on the stream with this handle; see `HostPlanes.load`."""
        with self._on(stream):
            for slots, pages, room in self._batches(blocks, self._loads):
                self._copy(_rows(room.slots), slots, _sizes(room.slots), stream)
                self._planes.merge(room.slots, room.slots, room.places)
                if not self._plain:
                    pool, own, sizes = self._map.ranges(_rows(room.raw), pages, whole=False)
                    self._copy(pool, own, sizes, stream)

    def save(self, blocks: Blocks, stream: int) -> None:
        """Take blocks in pages apart on the stream with this handle; see `HostPlanes.save`."""
        with self._on(stream):
            for slots, pages, room in self._batches(blocks, self._saves):
                if not self._plain:
                    pool, own, sizes = self._map.ranges(_rows(room.raw), pages)
                    self._copy(own, pool, sizes, stream)
                self._planes.split(room.slots, room.slots, room.places)
                self._copy(slots, _rows(room.slots), _sizes(room.slots), stream)

    def _on(self, stream: int) -> torch.cuda.StreamContext:
        return torch.cuda.stream(torch.cuda.ExternalStream(stream, self._device))  # type: ignore[no-untyped-call]

    def _batches(
        self, blocks: Blocks, room: _Room
    ) -> Iterator[tuple[Addresses, Sequence[Sequence[int]], _Room]]:
        """Yield the addresses of slots, the pages, and the room of each batch."""
        slots, pages = blocks
        places = self._places(self._map.starts(pages), room.slots) if self._plain else None
        for at in range(0, len(slots), self._batch):
            part = slice(at, at + self._batch)
            own = room.first(len(slots[part]))
            yield slots[part], pages[part], own if places is None else own._replace(places=places[part])

    def _places(self, starts: Addresses, anchor: torch.Tensor) -> torch.Tensor:
        offsets = (starts.astype(np.int64) - anchor.data_ptr()) // 2
        # The pinned memory is not used again before it has been read.
        return torch.from_numpy(offsets).pin_memory().to(self._device, non_blocking=True)

    def _room(self) -> _Room:
        raw_bytes = 0 if self._plain else self._form.layout.shard_bytes
        slots, raw = (
            torch.zeros(self._batch, size, dtype=torch.uint8, device=self._device)
            for size in (self._form.shard_bytes, raw_bytes)
        )
        return _Room(slots, raw, self._places(_rows(raw) if raw_bytes else _rows(slots), slots))

    def _warm_up(self) -> None:
        """Run each kernel once on a block of zeros: compiling and loading kernels waits for the whole GPU."""
        slots = self._loads.slots[:1]
        block = torch.zeros(self._form.layout.shard_bytes, dtype=torch.uint8, device=self._device)
        place = self._places(np.array([block.data_ptr()], np.uint64), slots)
        self._planes.split(slots, slots, place)
        self._planes.merge(slots, slots, place)
        torch.cuda.synchronize(self._device)


def _address_of(array: NDArray[np.uint8]) -> Addresses:
    return np.array([array.ctypes.data], np.uint64)


def _rows(tensor: torch.Tensor) -> Addresses:
    """Return the address of each row."""
    count, stride = tensor.shape
    first = tensor.data_ptr()
    return np.arange(first, first + count * stride, stride, dtype=np.uint64)


def _sizes(tensor: torch.Tensor) -> Addresses:
    return np.full(tensor.shape[0], tensor.shape[1], np.uint64)
