"""Movers of blocks between plane slots and a pool: put together on the way in, taken apart on the way out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.codec import PlaneSlots
from kvtier.errors import ConfigError
from kvtier.gpu.copies import Addresses, Copy, copy_on_host
from kvtier.gpu.ranges import PageMap
from kvtier.gpu.tables import Tables

STAGING_BYTES = 64 << 20
"""Memory of the GPU that each direction takes for slots. A batch of so much is copied in a millisecond."""

ALIGNMENT = 16
"""Blocks at other addresses, and those in several pieces, are put together in memory of the mover first."""

TABLE_BLOCKS = 1024
TABLES = 64
"""Places of so many blocks stand in one table, and so many tables may be under way: half a MiB in all."""

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
        self._batch = batch_blocks(form)
        with torch.cuda.device(device):
            self._loads, self._saves = self._room(), self._room()
            self._tables = Tables(device, TABLE_BLOCKS, TABLES)
            self._warm_up()

    def load(self, blocks: Blocks, stream: int) -> None:
        """Put blocks together in their pages on the stream with this handle; see `HostPlanes.load`."""
        external = self._external(stream)
        with torch.cuda.stream(external):
            for slots, pages, room in self._batches(blocks, self._loads, external):
                self._copy(_rows(room.slots), slots, _sizes(room.slots), stream)
                self._planes.merge(room.slots, room.slots, room.places)
                if not self._plain:
                    pool, own, sizes = self._map.ranges(_rows(room.raw), pages, whole=False)
                    self._copy(pool, own, sizes, stream)

    def save(self, blocks: Blocks, stream: int) -> None:
        """Take blocks in pages apart on the stream with this handle; see `HostPlanes.save`."""
        external = self._external(stream)
        with torch.cuda.stream(external):
            for slots, pages, room in self._batches(blocks, self._saves, external):
                if not self._plain:
                    pool, own, sizes = self._map.ranges(_rows(room.raw), pages)
                    self._copy(own, pool, sizes, stream)
                self._planes.split(room.slots, room.slots, room.places)
                self._copy(slots, _rows(room.slots), _sizes(room.slots), stream)

    def _external(self, stream: int) -> Any:
        return torch.cuda.ExternalStream(stream, self._device)  # type: ignore[no-untyped-call]

    def _batches(
        self, blocks: Blocks, room: _Room, stream: Any
    ) -> Iterator[tuple[Addresses, Sequence[Sequence[int]], _Room]]:
        """Yield the addresses of slots, the pages, and the room of each batch."""
        step = TABLE_BLOCKS // self._batch * self._batch
        for first in range(0, len(blocks[0]), step):
            slots, pages = blocks[0][first : first + step], blocks[1][first : first + step]
            with self._places(pages, room, stream) as places:
                for at in range(0, len(slots), self._batch):
                    part = slice(at, at + self._batch)
                    own = room.first(len(slots[part]))
                    yield slots[part], pages[part], own._replace(places=places[part]) if self._plain else own

    def _places(
        self, pages: Sequence[Sequence[int]], room: _Room, stream: Any
    ) -> AbstractContextManager[torch.Tensor]:
        if self._plain:
            return self._tables.lend(_offsets(self._map.starts(pages), room.slots), stream)
        return nullcontext(room.places)

    def _room(self) -> _Room:
        raw_bytes = 0 if self._plain else self._form.layout.shard_bytes
        slots, raw = (
            torch.zeros(self._batch, size, dtype=torch.uint8, device=self._device)
            for size in (self._form.shard_bytes, raw_bytes)
        )
        places = _offsets(_rows(raw) if raw_bytes else _rows(slots), slots)
        return _Room(slots, raw, torch.from_numpy(places).to(self._device))

    def _warm_up(self) -> None:
        """Run each kernel on blocks of zeros: compiling and loading kernels waits for the whole GPU.

        One block alone and several are not the same to PyTorch, which fills one range or many.
        """
        block = torch.zeros(2, self._form.layout.shard_bytes, dtype=torch.uint8, device=self._device)
        for count in (1, 2):
            slots = self._loads.slots[:count]
            starts = _offsets(_rows(block[:count]), slots)
            with self._tables.lend(starts, torch.cuda.current_stream()) as places:
                self._planes.split(slots, slots, places)
                self._planes.merge(slots, slots, places)
        torch.cuda.synchronize(self._device)


def mover_of_planes(
    form: PlaneSlots, pool_map: PageMap, device: torch.device, copies: Callable[[], Copy]
) -> HostPlanes | CudaPlanes:
    """Return what moves blocks of a pool from and to slots of planes.

    Args:
        form: Form of the slots.
        pool_map: Where blocks lie in the pool.
        device: Where the pool lies.
        copies: Makes what copies ranges, should it be a GPU.

    Raises:
        ConfigError: The GPU cannot take blocks apart here.
    """
    if device.type != "cuda":
        return HostPlanes(form, pool_map)
    copy = copies()
    try:
        return CudaPlanes(form, pool_map, copy, device)
    except Exception as error:
        raise ConfigError(f"memory.format: planes needs Triton, which does not work here: {error}") from error


def batch_blocks(form: PlaneSlots) -> int:
    """Return how many blocks make a batch: an even number, so that places begin at multiples of 16 bytes.

    Kernels are compiled for these, and would be compiled once more for others, while the engine waits.
    """
    return min(TABLE_BLOCKS, max(2, STAGING_BYTES // form.shard_bytes // 2 * 2))


def _offsets(starts: Addresses, anchor: torch.Tensor) -> NDArray[np.int64]:
    """Return where blocks begin, in 2 bytes from the anchor."""
    return (starts.astype(np.int64) - anchor.data_ptr()) // 2


def _address_of(array: NDArray[np.uint8]) -> Addresses:
    return np.array([array.ctypes.data], np.uint64)


def _rows(tensor: torch.Tensor) -> Addresses:
    """Return the address of each row."""
    count, stride = tensor.shape
    first = tensor.data_ptr()
    return np.arange(first, first + count * stride, stride, dtype=np.uint64)


def _sizes(tensor: torch.Tensor) -> Addresses:
    return np.full(tensor.shape[0], tensor.shape[1], np.uint64)
