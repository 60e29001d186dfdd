"""The order of copies and passes, on streams that run in any order that their events allow.

The same machine as in `tests/e2e/test_gpu_stress.py`, which says how to give it other seeds, and how to take
orders out.
"""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import pytest
import torch

from kvtier.connector.transfer import Blocks, CudaTransfers, RawMover
from kvtier.trtllm.pool import Pool
from tests.stress_support import LAYERS, MUTILATED, PAGES, SLOTS, Stress, seeds_until_wrong, stress_seeds
from tests.trtllm_support import memory_stores, write_config
from tests.virtual_gpu import VirtualGpu

ROW = 32


def stress(
    kind: type[CudaTransfers], seed: int, monkeypatch, tmp_path, iterations: int
) -> tuple[int, Stress]:
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    gpu = VirtualGpu(rng)
    pool = torch.full((PAGES, LAYERS, 2, ROW), -1, dtype=torch.int16).view(torch.bfloat16)

    def transfers(pool: Pool) -> CudaTransfers:
        mover = RawMover(pool.map, gpu.copy)
        return kind(mover, gpu.stream(), gpu.stream())

    with memory_stores(monkeypatch, slots=SLOTS):
        world = Stress(gpu, pool, transfers, rng)
        wrong = world.run(iterations)
        return wrong, world


@pytest.mark.parametrize("seed", stress_seeds(list(range(6))))
def test_every_byte_is_right_however_the_streams_run(seed, monkeypatch, tmp_path):
    wrong, world = stress(CudaTransfers, seed, monkeypatch, tmp_path, 150)
    assert wrong == 0
    counts, stats = world.counts, world.rig.worker.stats()
    assert min(counts.loaded, counts.cancelled, counts.held, counts.ordered, stats["saved_blocks"]) > 5
    assert world.rig.leader.stats()["store_leases"] == 0
    assert world.rig.leader.stats()["store_filling_slots"] == 0


@pytest.mark.parametrize("kind", MUTILATED)
def test_without_one_of_the_orders_bytes_go_wrong(kind, monkeypatch, tmp_path):
    assert seeds_until_wrong(lambda seed: stress(kind, seed, monkeypatch, tmp_path, 150)[0], 0)


class HalfMover:
    """Loads some of a pool's words, then fails."""

    def __init__(self, gpu: VirtualGpu, pool: list[str]) -> None:
        self._gpu, self._pool = gpu, pool

    def load(self, blocks, stream: int) -> None:
        for place in range(3):
            self._gpu.run(self._gpu.numbered(stream), partial(self._pool.__setitem__, place, "loaded"))
        raise OSError("refused")


@pytest.mark.parametrize("seed", range(20))
def test_what_is_computed_in_place_of_a_load_that_failed_is_not_overwritten(seed):
    """An engine that is told of it computes the same pages while some of the copies may be under way."""
    gpu, pool = VirtualGpu(random.Random(seed)), [""] * 3
    transfers = CudaTransfers(HalfMover(gpu, pool), gpu.stream(), gpu.stream())
    with pytest.raises(OSError, match="refused"):
        transfers.load(gpu.engine, Blocks(np.zeros(3, np.uint64), [(0,), (1,), (2,)]), lambda made: None)
    for place in range(3):
        gpu.run(gpu.engine, partial(pool.__setitem__, place, "computed"))
    gpu.synchronize()
    assert pool == ["computed"] * 3
