"""Loads by layer: only where the hooks of the layers are certain, and what happens if they fail to run."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from kvtier.connector.guard import BrokenPromise
from kvtier.connector.transfer import CudaTransfers, RawMover
from kvtier.trtllm.hooks import LayerHooks
from kvtier.trtllm.movers import layer_parts
from tests.trtllm_support import (
    LAYERS,
    SIZE,
    FakeRequest,
    Rig,
    llm_args,
    make_rig,
    memory_stores,
    write_config,
)
from tests.virtual_gpu import VirtualGate, VirtualGpu

EAGER = {"backend": "pytorch", "torch_compile_config": None}


def run_pass(hooks: LayerHooks, layers: list[int]) -> bool:
    hooks.begin(LAYERS)
    for layer in layers:
        hooks.ran(layer)
    return hooks.end()


@pytest.mark.parametrize(
    ("arguments", "certain"),
    [
        (EAGER, True),
        ({"backend": "pytorch"}, False),
        ({"torch_compile_config": None}, False),
        ({"backend": "_autodeploy", "torch_compile_config": None}, False),
        ({"backend": "pytorch", "torch_compile_config": SimpleNamespace()}, False),
    ],
)
def test_arguments_that_rule_out_compilation(arguments, certain):
    hooks = LayerHooks(llm_args(**arguments))
    assert not hooks.certain(LAYERS)
    assert run_pass(hooks, list(range(LAYERS)))
    assert hooks.certain(LAYERS) is certain
    assert not hooks.certain(0)


@pytest.mark.parametrize("layers", [[], [0, 1, 0, 1], [0, 1, 0]])
def test_passes_without_hooks_and_with_more_are_no_matter(layers):
    hooks = LayerHooks(llm_args(**EAGER))
    assert run_pass(hooks, [])
    assert not hooks.certain(LAYERS)
    assert run_pass(hooks, [0, 1])
    assert run_pass(hooks, layers)
    assert hooks.certain(LAYERS)


@pytest.mark.parametrize("layers", [[0], [1], [1, 0], [0, 0, 1], [0, 2]])
def test_one_pass_with_some_hooks_ends_it_for_good(layers):
    hooks = LayerHooks(llm_args(**EAGER))
    assert run_pass(hooks, [0, 1])
    assert hooks.certain(LAYERS)
    assert not run_pass(hooks, layers)
    assert not hooks.certain(LAYERS)
    assert run_pass(hooks, [0, 1])
    assert not hooks.certain(LAYERS)


def test_a_pass_that_fails_proves_nothing():
    hooks = LayerHooks(llm_args(**EAGER))
    hooks.begin(LAYERS)
    hooks.ran(0)
    assert not hooks.certain(LAYERS)
    assert run_pass(hooks, [0, 1])
    hooks.begin(LAYERS)
    hooks.ran(0)
    assert hooks.certain(LAYERS)
    hooks.forget()
    assert not hooks.certain(LAYERS)


class Loading:
    """A rig on a GPU of the imagination, with a prompt that is in the store."""

    def __init__(self) -> None:
        self.gpu = VirtualGpu(random.Random(1))
        self.rig: Rig = make_rig(arguments=llm_args(**EAGER))
        worker, gpu = self.rig.worker, self.gpu
        runtime = self.rig.leader._runtime
        runtime.ready = replace(runtime.ready, on_gpu=True)
        mover = RawMover(worker._pool.map, gpu.copy)
        parts = layer_parts(worker._pool, lambda size: gpu.copy, 1)
        self.gate = VirtualGate()
        worker._transfers = CudaTransfers(mover, gpu.stream(), gpu.stream(), parts, self.gate)
        self.tokens = list(range(4 * SIZE))
        self.ids = iter(range(1, 100))
        self.iterate(list(range(LAYERS)), [0, 1, 2, 3])
        self.gpu.synchronize()
        self.rig.worker.get_finished([], [])

    def iterate(self, hooks: list[int], pages: list[int]) -> int:
        """Run a pass over the prompt; returns the tokens that were promised to it."""
        rig, request = self.rig, FakeRequest(next(self.ids), [*self.tokens, 1])
        promised, _ = rig.leader.get_num_new_matched_tokens(request, 0)
        pages = [*pages, 31]
        rig.leader.update_state_after_alloc(request, pages)
        rig.begin([rig.data(request, request.tokens, pages, 0, len(request.tokens) - promised)])
        rig.worker.start_load_kv(self.gpu.engine)
        if not promised:
            for block in range(4):
                self.gpu.engine.enqueue(lambda block=block: rig.fill(pages[block], block))
        for layer in hooks:
            rig.worker.wait_for_layer_load(layer, self.gpu.engine)
        rig.worker.wait_for_save(self.gpu.engine)
        return promised


@pytest.fixture
def loading(monkeypatch, tmp_path):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))
    monkeypatch.setattr("kvtier.trtllm.worker.BY_LAYER_BYTES", 0)
    with memory_stores(monkeypatch, slots=16):
        yield Loading()


def test_the_first_load_is_whole_and_the_next_by_layer(loading):
    wait_layer = loading.rig.worker._transfers.wait_layer
    for pages, by_layer in (([4, 5, 6, 7], False), ([8, 9, 10, 11], True)):
        seen = []
        loading.rig.worker._transfers.wait_layer = lambda layer, stream, seen=seen: (
            seen.append(layer) or wait_layer(layer, stream)
        )
        assert loading.iterate(list(range(LAYERS)), pages) == 4 * SIZE
        assert seen == (list(range(LAYERS)) if by_layer else [])
        loading.gpu.synchronize()
        assert all(loading.rig.holds(page, block) for block, page in enumerate(pages))
        loading.rig.worker.get_finished([], [])
    assert loading.rig.leader.stats()["store_leases"] == 0


def test_small_loads_are_whole(loading, monkeypatch):
    assert loading.iterate([0, 1], [4, 5, 6, 7])
    monkeypatch.setattr("kvtier.trtllm.worker.BY_LAYER_BYTES", 1 << 20)
    monkeypatch.setattr(loading.rig.worker._transfers, "load_by_layer", None)
    assert loading.iterate([0, 1], [8, 9, 10, 11]) == 4 * SIZE
    loading.gpu.synchronize()
    assert all(loading.rig.holds(page, block) for block, page in enumerate([8, 9, 10, 11]))


@pytest.mark.parametrize(("least", "layers"), [(1, [1, 1]), (1 << 20, [])])
def test_parts_are_not_too_small_to_be_copied_fast(loading, least, layers):
    parts = layer_parts(loading.rig.worker._pool, lambda size: loading.gpu.copy, least)
    assert [part.layers for part in parts] == layers


def test_a_layer_without_its_hook_ends_the_engine(loading):
    """No wrong block is served: neither the pass nor the engine go on, and nothing of it is saved."""
    worker = loading.rig.worker
    assert loading.iterate([0, 1], [4, 5, 6, 7])
    with pytest.raises(BrokenPromise, match="hooks"):
        loading.iterate([0], [8, 9, 10, 11])
    saved = worker.stats()["saved_blocks"]
    with pytest.raises(BrokenPromise, match="hooks"):
        worker.get_finished([], [])
    with pytest.raises(BrokenPromise, match="hooks"):
        worker.start_load_kv(loading.gpu.engine)
    loading.gpu.synchronize()
    worker.close()
    assert worker.stats()["saved_blocks"] == saved


def test_a_pass_that_failed_does_not_count(loading):
    assert loading.iterate([0, 1], [4, 5, 6, 7])
    request = FakeRequest(50, [*loading.tokens, 1])
    assert loading.rig.leader.get_num_new_matched_tokens(request, 0) == (4 * SIZE, False)
    loading.rig.leader.update_state_after_alloc(request, [8, 9, 10, 11, 31])
    loading.rig.begin([loading.rig.data(request, request.tokens, [8, 9, 10, 11, 31], 0, 1)])
    loading.rig.worker.start_load_kv(loading.gpu.engine)
    loading.rig.worker.wait_for_layer_load(0, loading.gpu.engine)
    loading.rig.worker.get_finished([], [])
    loading.rig.begin()
    loading.rig.worker.start_load_kv(loading.gpu.engine)
    for layer in range(LAYERS):
        loading.rig.worker.wait_for_layer_load(layer, loading.gpu.engine)
    loading.rig.worker.wait_for_save(loading.gpu.engine)
    assert loading.rig.worker._hooks.certain(LAYERS)


@pytest.mark.parametrize("captured", [False, True])
def test_without_hooks_everything_is_loaded_before_the_pass(loading, captured):
    """As in a replayed graph; one that is being captured runs hooks that nothing may follow from."""
    assert loading.iterate([0, 1], [12, 13, 14, 15])
    loading.gate.capturing = captured
    for first in (4, 8):
        pages = list(range(first, first + 4))
        assert loading.iterate([0, 1] if captured else [], pages) == 4 * SIZE
        # What stands behind the pass on its stream has all of the load before it.
        done = []
        loading.gpu.engine.enqueue(lambda done=done: done.append(True))
        while not done:
            loading.gpu.run_one()
        assert all(loading.rig.holds(page, block) for block, page in enumerate(pages))
        loading.rig.worker.get_finished([], [])
    assert not torch.equal(loading.rig.bytes_of(4), loading.rig.bytes_of(5))
