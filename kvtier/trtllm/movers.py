"""What moves the blocks of a pool that TensorRT-LLM registered: as they are, or taken apart into planes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from kvtier._logging import log_once
from kvtier.codec import PlaneSlots, SlotForm
from kvtier.connector.transfer import CudaTransfers, HostTransfers, Layers, Mover, RawMover, Transfers
from kvtier.gpu.copies import Copy, CudaCopies, copy_on_host
from kvtier.gpu.gate import Gate
from kvtier.gpu.kernel_copies import KernelCopies
from kvtier.gpu.plane_movers import mover_of_planes
from kvtier.trtllm.pool import Pool

_log = logging.getLogger(__name__)

PARTS = 4
"""Of a load by layer, at most. Each of them costs the engine's thread as much as a whole load."""

BATCHES = (4096,)
"""Blocks of a launch: the first part of a load is small enough for copies to begin soon."""

PART_BYTES = 128 << 10
"""Of a part of a block, at least. How fast smaller ones arrive was not measured."""


def transfers_for(pool: Pool, form: SlotForm) -> Transfers:
    """Return what moves the blocks of this pool from and to slots of this form.

    Raises:
        ConfigError: The GPU cannot take blocks apart here.
    """
    on_gpu = pool.device.type == "cuda"
    copies = partial(CudaCopies, pool.device)
    mover: Mover
    if isinstance(form, PlaneSlots):
        mover = mover_of_planes(form, pool.map, pool.device, copies)
    else:
        mover = RawMover(pool.map, copies() if on_gpu else copy_on_host, pool.loads)
    if not on_gpu:
        return HostTransfers(mover)
    loads = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
    saves = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
    if isinstance(form, PlaneSlots):
        return CudaTransfers(mover, loads, saves)
    return CudaTransfers(mover, loads, saves, *_by_layer(pool, copies()))


def _by_layer(pool: Pool, copies: Copy) -> tuple[list[Layers], Gate | None]:
    """Return the parts of a load by layer, and the gate; neither where the GPU or Triton cannot do that."""
    try:
        # Behind the driver's copies those that the engine makes for its pass would wait for the whole load.
        parts = layer_parts(pool, lambda size: KernelCopies(pool.device, copies, size))
        return parts, Gate(pool.device) if parts else None
    except Exception as error:  # noqa: BLE001 - whatever it is that is missing, there is another way
        log_once(_log, "gate", "loads are not waited for layer by layer: %r", error)
        return [], None


def layer_parts(pool: Pool, copy_of: Callable[[int], Copy], least_bytes: int = PART_BYTES) -> list[Layers]:
    """Return how the blocks of a pool are loaded by layer; nothing where that does not pay or cannot be.

    Args:
        pool: The pool.
        copy_of: Makes what copies ranges of so many bytes.
        least_bytes: Of a part of a block.
    """
    parts = min(PARTS, pool.layout.layers, pool.layout.shard_bytes // least_bytes)
    if pool.layout.kind != "flat" or parts < 2:
        return []
    layers, size = pool.layout.layers, pool.layout.shard_bytes // pool.layout.layers
    firsts = [layers * part // parts for part in range(parts + 1)]
    copies = {count: copy_of(count * size) for count in {stop - start for start, stop in pairwise(firsts)}}
    return [
        Layers(
            stop - start,
            RawMover(pool.map.part(start * size, stop * size), copies[stop - start], batches=BATCHES),
        )
        for start, stop in pairwise(firsts)
    ]
