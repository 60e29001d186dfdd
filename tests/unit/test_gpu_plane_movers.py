"""Movers of planes: what becomes of a GPU that cannot have them, and of batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvtier.codec import PlaneSlots, slot_form
from kvtier.errors import ConfigError
from kvtier.gpu import plane_movers
from kvtier.gpu.plane_movers import HostPlanes, batch_blocks, mover_of_planes
from kvtier.gpu.ranges import PageMap, Region
from kvtier.layout import BlockLayout
from kvtier.trtllm import movers as trtllm_movers

GPU = torch.device("cuda", 0)


def form_of(layers: int, heads: int = 8) -> PlaneSlots:
    form = slot_form(BlockLayout("bfloat16", 32, layers, 2, heads * 32 * 128, head_dim=128), "planes")
    assert isinstance(form, PlaneSlots)
    return form


def page_map(form: PlaneSlots) -> PageMap:
    size = form.layout.shard_bytes
    return PageMap([Region(0, 4096, size, size, 4)], 1)


def no_triton(*arguments):
    raise ImportError("No module named 'triton'")


def test_without_triton_planes_are_a_mistake_in_the_configuration(monkeypatch):
    monkeypatch.setattr(plane_movers, "CudaPlanes", no_triton)
    form = form_of(1)
    with pytest.raises(ConfigError, match=r"memory\.format: planes needs Triton.*No module named 'triton'"):
        mover_of_planes(form, page_map(form), GPU, lambda: no_triton)


def test_trtllm_says_the_same(monkeypatch):
    monkeypatch.setattr(plane_movers, "CudaPlanes", no_triton)
    monkeypatch.setattr(trtllm_movers, "CudaCopies", lambda device: no_triton)
    form = form_of(1)
    pool = SimpleNamespace(device=GPU, map=page_map(form), loads=None)
    with pytest.raises(ConfigError, match=r"memory\.format: planes needs Triton"):
        trtllm_movers.transfers_for(pool, form)


def test_a_pool_in_host_memory_needs_no_copies_of_a_gpu():
    form = form_of(1)
    mover = mover_of_planes(form, page_map(form), torch.device("cpu"), no_triton)
    assert isinstance(mover, HostPlanes)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (7, 8), (16, 8), (32, 8), (33, 8), (27, 16), (80, 8)])
def test_every_batch_begins_at_an_even_place(layers, heads):
    """Triton compiles a kernel once more for a pointer that is no multiple of 16, while the engine waits."""
    form = form_of(layers, heads)
    batch = batch_blocks(form)
    assert batch % 2 == 0
    assert 2 <= batch <= plane_movers.TABLE_BLOCKS
    assert batch == 2 or batch * form.shard_bytes <= plane_movers.STAGING_BYTES
