"""Saves on a GPU begin when the tokens of the pass are on their way to the host, or with the next orders."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from kvtier.connector.transfer import CudaTransfers, RawMover
from tests.trtllm_support import SIZE, FakeRequest, make_rig, memory_stores, write_config
from tests.virtual_gpu import VirtualGpu

TOKENS = list(range(4 * SIZE))
PAGES = [3, 4, 5, 6]


class Computing:
    """A rig whose worker has just been told to save four blocks, and what was copied so far."""

    def __init__(self) -> None:
        gpu = self.gpu = VirtualGpu(random.Random(1))
        self.rig = make_rig()
        runtime = self.rig.leader._runtime
        runtime.ready = replace(runtime.ready, on_gpu=True)
        worker = self.rig.worker
        worker._transfers = CudaTransfers(RawMover(worker._pool.map, self.copy), gpu.stream(), gpu.stream())
        self.copied = 0
        self.request = FakeRequest(1, TOKENS)
        self.rig.leader.get_num_new_matched_tokens(self.request, 0)
        self.rig.leader.update_state_after_alloc(self.request, PAGES)
        self.rig.begin([self.rig.data(self.request, TOKENS, PAGES, 0, len(TOKENS))])
        worker.start_load_kv(gpu.engine)
        worker.wait_for_save(gpu.engine)

    def copy(self, destinations, sources, sizes, stream) -> None:
        self.copied += len(sizes)
        self.gpu.copy(destinations, sources, sizes, stream)

    def in_store(self) -> bool:
        self.gpu.synchronize()
        self.rig.worker.get_finished([], [])
        return self.rig.matched([*TOKENS, 1]) == len(TOKENS)


@pytest.fixture
def computing(monkeypatch, tmp_path):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))
    with memory_stores(monkeypatch, slots=16):
        yield Computing()


def test_they_begin_in_get_finished(computing):
    assert computing.copied == 0
    computing.rig.worker.get_finished([], [])
    assert computing.copied == 4
    assert computing.in_store()


def test_a_request_that_ends_in_its_pass_keeps_its_pages_until_they_are_over(computing):
    assert computing.rig.leader.request_finished(computing.request, PAGES)
    ended, _ = computing.rig.worker.get_finished([1], [])
    assert computing.copied == 4
    while not ended:
        assert computing.rig.matched([*TOKENS, 1]) == 0
        computing.gpu.run_one()
        ended, _ = computing.rig.worker.get_finished([], [])
    assert ended == [1]
    assert computing.rig.matched([*TOKENS, 1]) == len(TOKENS)


def test_they_begin_before_the_next_pass_whatever_the_engine_calls(computing):
    computing.rig.begin()
    assert computing.copied == 4
    assert computing.in_store()


def test_closing_makes_them(computing):
    computing.rig.worker.close()
    assert computing.copied == 4
    assert computing.rig.worker.stats()["saved_blocks"] == 4
