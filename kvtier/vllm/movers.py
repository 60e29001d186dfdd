"""How blocks of a pool of layers are copied: as they lie, or element by element into another order."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier._logging import log_once
from kvtier.codec import PlaneSlots, SlotForm
from kvtier.connector.transfer import Blocks, CudaTransfers, HostTransfers, Mover, RawMover, Transfers
from kvtier.errors import ConfigError
from kvtier.gpu.copies import Copy, CudaCopies, copy_on_host
from kvtier.gpu.kernel_copies import KernelCopies
from kvtier.gpu.plane_movers import mover_of_planes
from kvtier.vllm.pool import LayerPool

_log = logging.getLogger(__name__)


def transfers_for(pool: LayerPool, form: SlotForm) -> Transfers:
    """Return what moves the blocks of a pool from and to slots of this form.

    Raises:
        ConfigError: The blocks of this pool cannot be taken apart.
    """
    on_gpu = pool.device.type == "cuda"
    mover: Mover
    if isinstance(form, PlaneSlots):
        mover = _plane_mover(pool, form)
    elif pool.map is None:
        mover = CudaMover(pool) if on_gpu else HostMover(pool)
    elif on_gpu:
        copies = CudaCopies(pool.device)
        mover = Directions(RawMover(pool.map, _kernel_copies(pool, copies)), RawMover(pool.map, copies))
    else:
        mover = RawMover(pool.map, copy_on_host)
    if not on_gpu:
        return HostTransfers(mover)
    loads = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
    saves = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
    return CudaTransfers(mover, loads, saves)


def _plane_mover(pool: LayerPool, form: PlaneSlots) -> Mover:
    if pool.map is None:
        raise ConfigError("memory.format: planes needs a KV pool with heads before tokens (HND)")
    return mover_of_planes(form, pool.map, pool.device, lambda: _kernel_copies(pool, CudaCopies(pool.device)))


def _kernel_copies(pool: LayerPool, copies: Copy) -> Copy:
    """Return what copies a layer's part of blocks by a kernel, where Triton works."""
    try:
        return KernelCopies(pool.device, copies, pool.block_bytes // pool.shape[0])
    except Exception as error:  # noqa: BLE001 - whatever it is that is missing, there is another way
        log_once(
            _log, "kernel", "loads are copied range by range, since Triton does not work here: %r", error
        )
        return copies


class Directions:
    """Loads by one mover, saves by another."""

    def __init__(self, loads: Mover, saves: Mover) -> None:
        self._loads = loads
        self._saves = saves

    def load(self, blocks: Blocks, stream: int) -> None:
        """Copy slots to pages; see `Mover.load`."""
        self._loads.load(blocks, stream)

    def save(self, blocks: Blocks, stream: int) -> None:
        """Copy pages to slots; see `Mover.save`."""
        self._saves.save(blocks, stream)


class HostMover:
    """Moves blocks whose elements lie in another order in the pool than in a slot.

    One copy for K and one for V where the layers lie evenly, else one for each layer. NumPy makes them
    without the GIL and on this thread alone: torch would use the engine's threads, which compete with others.
    """

    def __init__(self, pool: LayerPool) -> None:
        self._pool = pool
        self._planes = [plane.numpy() for plane in pool.planes]

    def load(self, blocks: Blocks, stream: int) -> None:
        """Copy slots to pages; see `Mover.load`."""
        for slot, (page,) in zip(self._slots(blocks.slots), blocks.pages, strict=True):
            for plane, part in zip(self._planes, self._pool.parts, strict=True):
                np.copyto(plane[self._pool.checked(page)], slot[part])

    def save(self, blocks: Blocks, stream: int) -> None:
        """Copy pages to slots; see `Mover.save`."""
        for slot, (page,) in zip(self._slots(blocks.slots), blocks.pages, strict=True):
            for plane, part in zip(self._planes, self._pool.parts, strict=True):
                np.copyto(slot[part], plane[self._pool.checked(page)])

    def _slots(self, addresses: NDArray[np.uint64]) -> list[NDArray[Any]]:
        kind, words = ctypes.c_uint8 * self._pool.block_bytes, self._planes[0].dtype
        return [
            np.frombuffer(memoryview(kind.from_address(address)), dtype=words).reshape(self._pool.shape)
            for address in addresses.tolist()
        ]


class CudaMover:
    """Does the same on a GPU, by way of a block in its memory: a kernel for each layer, or for all.

    Loads follow on each other on one stream, saves on another.
    """

    def __init__(self, pool: LayerPool) -> None:
        """Take memory, and load the kernels. Waits for the GPU, and changes nothing in the pool."""
        self._pool = pool
        words = pool.planes[0].dtype
        with torch.cuda.device(pool.device):
            self._loaded, self._saved = (
                torch.empty(pool.shape, dtype=words, device=pool.device) for _ in range(2)
            )
            # Kernels are loaded when they first run, and that waits for the whole GPU.
            self._from_page(self._loaded, 0)
            self._to_page(self._loaded, 0)
            torch.cuda.synchronize(pool.device)

    def load(self, blocks: Blocks, stream: int) -> None:
        """Copy slots to pages; see `Mover.load`."""
        with self._on(stream):
            for slot, (page,) in zip(self._slots(blocks.slots), blocks.pages, strict=True):
                self._loaded.copy_(slot, non_blocking=True)
                self._to_page(self._loaded, page)

    def save(self, blocks: Blocks, stream: int) -> None:
        """Copy pages to slots; see `Mover.save`."""
        with self._on(stream):
            for slot, (page,) in zip(self._slots(blocks.slots), blocks.pages, strict=True):
                self._from_page(self._saved, page)
                slot.copy_(self._saved, non_blocking=True)

    def _to_page(self, block: torch.Tensor, page: int) -> None:
        for plane, part in zip(self._pool.planes, self._pool.parts, strict=True):
            plane[self._pool.checked(page)].copy_(block[part])

    def _from_page(self, block: torch.Tensor, page: int) -> None:
        for plane, part in zip(self._pool.planes, self._pool.parts, strict=True):
            block[part].copy_(plane[self._pool.checked(page)])

    def _on(self, stream: int) -> torch.cuda.StreamContext:
        external = torch.cuda.ExternalStream(stream, self._pool.device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(external)

    def _slots(self, addresses: NDArray[np.uint64]) -> list[torch.Tensor]:
        kind, words = ctypes.c_uint8 * self._pool.block_bytes, self._pool.planes[0].dtype
        return [
            torch.frombuffer(kind.from_address(address), dtype=words).view(self._pool.shape)
            for address in addresses.tolist()
        ]
