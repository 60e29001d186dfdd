"""The order of copies and passes, on streams that run in any order that their events allow."""

from __future__ import annotations

import random

import pytest
import torch

from kvtier.connector.transfer import CudaTransfers, RawMover
from kvtier.trtllm.pool import Pool
from tests.stress_support import LAYERS, MUTILATED, PAGES, SLOTS, Stress
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


@pytest.mark.parametrize("seed", range(6))
def test_every_byte_is_right_however_the_streams_run(seed, monkeypatch, tmp_path):
    wrong, world = stress(CudaTransfers, seed, monkeypatch, tmp_path, 150)
    assert wrong == 0
    counts, stats = world.counts, world.rig.worker.stats()
    assert min(counts.loaded, counts.cancelled, counts.held, counts.ordered, stats["saved_blocks"]) > 20
    assert counts.failed > 0
    assert world.rig.leader.stats()["store_leases"] == 0
    assert world.rig.leader.stats()["store_filling_slots"] == 0


@pytest.mark.parametrize("kind", MUTILATED)
def test_without_one_of_the_orders_bytes_go_wrong(kind, monkeypatch, tmp_path):
    assert any(stress(kind, seed, monkeypatch, tmp_path, 150)[0] for seed in range(40))
