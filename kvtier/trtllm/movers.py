"""What moves the blocks of a pool that TensorRT-LLM registered: as they are, or taken apart into planes."""

from __future__ import annotations

from functools import partial

import torch

from kvtier.codec import PlaneSlots, SlotForm
from kvtier.connector.transfer import CudaTransfers, HostTransfers, Mover, RawMover, Transfers
from kvtier.gpu.copies import CudaCopies, copy_on_host
from kvtier.gpu.plane_movers import mover_of_planes
from kvtier.trtllm.pool import Pool


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
    return CudaTransfers(mover, loads, saves)
