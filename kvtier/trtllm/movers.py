"""What moves the blocks of a pool that TensorRT-LLM registered: as they are, or taken apart into planes."""

from __future__ import annotations

import logging
from itertools import pairwise

import torch

from kvtier._logging import log_once
from kvtier.codec import PlaneSlots, SlotForm
from kvtier.connector.transfer import CudaTransfers, HostTransfers, Layers, Mover, RawMover, Transfers
from kvtier.errors import ConfigError
from kvtier.gpu.copies import Copy, CudaCopies, copy_on_host
from kvtier.gpu.gate import Gate
from kvtier.gpu.plane_movers import CudaPlanes, HostPlanes
from kvtier.trtllm.pool import Pool

_log = logging.getLogger(__name__)

PARTS = 4
"""Of a load by layer, at most. Each of them costs the engine's thread as much as a whole load."""

PART_BYTES = 256 << 10
"""Smaller copies to a GPU are slower."""


def transfers_for(pool: Pool, form: SlotForm) -> Transfers:
    """Return what moves the blocks of this pool from and to slots of this form.

    Raises:
        ConfigError: The GPU cannot take blocks apart here.
    """
    planes = form if isinstance(form, PlaneSlots) else None
    mover: Mover
    if pool.device.type != "cuda":
        mover = HostPlanes(planes, pool.map) if planes else RawMover(pool.map, copy_on_host, pool.loads)
        return HostTransfers(mover)
    copies = CudaCopies(pool.device)
    try:
        mover = (
            CudaPlanes(planes, pool.map, copies, pool.device)
            if planes
            else RawMover(pool.map, copies, pool.loads)
        )
    except Exception as error:
        raise ConfigError(f"memory.format: planes needs Triton, which does not work here: {error}") from error
    loads = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
    saves = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
    parts = () if planes else layer_parts(pool, copies)
    return CudaTransfers(mover, loads, saves, parts, _gate(pool.device) if parts else None)


def _gate(device: torch.device) -> Gate | None:
    try:
        return Gate(device)
    except OSError as error:
        log_once(_log, "gate", "loads are not waited for layer by layer: %s", error)
        return None


def layer_parts(pool: Pool, copy: Copy, least_bytes: int = PART_BYTES) -> list[Layers]:
    """Return how the blocks of a pool are loaded by layer; nothing where that does not pay or cannot be.

    Args:
        pool: The pool.
        copy: Copies ranges.
        least_bytes: Of a part of a block.
    """
    parts = min(PARTS, pool.layout.layers, pool.layout.shard_bytes // least_bytes)
    if pool.layout.kind != "flat" or parts < 2:
        return []
    layers, size = pool.layout.layers, pool.layout.shard_bytes // pool.layout.layers
    firsts = [layers * part // parts for part in range(parts + 1)]
    return [
        Layers(stop - start, RawMover(pool.map.part(start * size, stop * size), copy))
        for start, stop in pairwise(firsts)
    ]
