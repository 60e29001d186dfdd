"""Blocks whose elements lie in another order in a GPU's pool, with the GPU's part done by the CPU."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kvtier.connector.transfer import Blocks
from kvtier.vllm.movers import CudaMover
from kvtier.vllm.pool import LayerPool
from tests.vllm.test_worker import BLOCKS, LAYOUT, content, pools


@pytest.fixture
def no_gpu(monkeypatch):
    for name in ("device", "stream", "ExternalStream"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.mark.parametrize("name", ["NHD", "K/V first", "K by V"])
def test_a_gpus_mover_brings_the_same_bytes_and_its_warm_up_changes_none(name, no_gpu):
    engine, caches = pools()[name]
    before = {layer: cache.clone() for layer, cache in caches.items()}
    mover = CudaMover(LayerPool(caches, BLOCKS, engine))
    assert all(torch.equal(caches[layer], before[layer]) for layer in caches)
    slots = torch.zeros(BLOCKS, LAYOUT.block_bytes, dtype=torch.uint8)
    addresses = np.array([slot.data_ptr() for slot in slots], dtype=np.uint64)
    mover.save(Blocks(addresses, [(n,) for n in range(BLOCKS)]), 0)
    assert torch.equal(slots.view(torch.float32).view(content().shape), content())
    for cache in caches.values():
        cache.zero_()
    mover.load(Blocks(addresses, [(n,) for n in range(BLOCKS)]), 0)
    assert all(torch.equal(caches[layer], before[layer]) for layer in caches)
