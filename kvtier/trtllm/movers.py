"""What moves the blocks of a pool that TensorRT-LLM registered: as they are, or taken apart into planes."""

from __future__ import annotations

import torch

from kvtier.codec import PlaneSlots, SlotForm
from kvtier.connector.transfer import CudaTransfers, HostTransfers, Mover, RawMover, Transfers
from kvtier.errors import ConfigError
from kvtier.gpu.copies import CudaCopies, copy_on_host
from kvtier.gpu.plane_movers import CudaPlanes, HostPlanes
from kvtier.trtllm.pool import Pool


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
    return CudaTransfers(mover, loads, saves)
