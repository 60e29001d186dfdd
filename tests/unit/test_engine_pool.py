"""Pages: who holds them, in which order they are evicted, and where their bytes lie."""

from __future__ import annotations

import pytest
import torch

from kvtier.engine import EngineConfig, KVMemory, ModelSpec
from kvtier.engine.pool import BlockPool, OutOfPages

SPEC = ModelSpec(layers=5, kv_heads=2, head_dim=4, vocab_size=10)


def test_freed_blocks_are_kept_and_evicted_oldest_chain_end_first() -> None:
    pool = BlockPool([4])
    old, young = [pool.allocate(), pool.allocate()], [pool.allocate(), pool.allocate()]
    for index, block in enumerate(old + young):
        pool.register(block, b"%d" % index)
    with pytest.raises(OutOfPages):
        pool.allocate()
    pool.release(old)
    pool.release(young)
    assert pool.available == 4
    end_of_old = old[1].pages
    assert pool.allocate().pages == end_of_old
    assert pool.match([b"0", b"1"]) == [old[0]]
    assert pool.match([b"2", b"3"]) == young
    with pytest.raises(OutOfPages):
        pool.allocate()


def test_a_shared_block_stays_until_the_last_holder_lets_go() -> None:
    pool = BlockPool([2])
    block = pool.allocate()
    pool.register(block, b"k")
    assert pool.match([b"k"]) == [block]
    pool.release([block])
    assert pool.available == 1
    pool.release([block])
    assert pool.available == 2
    pool.forget()
    assert pool.match([b"k"]) == []


def test_a_prefix_is_registered_once_and_only_whole() -> None:
    pool = BlockPool([4, 4])
    first, second, partial = pool.allocate(), pool.allocate(), pool.allocate(without=[1])
    pool.register(first, b"k")
    pool.register(second, b"k")
    pool.register(partial, b"p")
    assert (first.key, second.key, partial.key) == (b"k", None, None)
    pool.drop_page(first, 0)
    pool.drop_page(second, 0)
    assert first.pages[0] != -1
    assert second.pages[0] == -1
    pool.release([first, second, partial])
    assert pool.available == 4


def test_the_flat_pool_has_the_upstream_shape() -> None:
    memory = KVMemory(SPEC, EngineConfig(num_blocks=3, tokens_per_block=8))
    assert memory.tensor is not None
    assert memory.tensor.shape == (3, 5, 2, 2 * 8 * 4)
    assert torch.isnan(memory.tensor.float()).all()
    memory.values[4][2, 1, 7] = torch.arange(4).bfloat16()
    assert memory.tensor[2, 4, 1, -4:].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_regions_lead_to_the_same_bytes_as_the_views(num_groups: int) -> None:
    config = EngineConfig(
        num_blocks=3, tokens_per_block=8, version="main", layout="groups", num_groups=num_groups
    )
    memory = KVMemory(SPEC, config)
    layout = memory.layout
    assert layout is not None
    assert memory.tensor is None
    assert sorted(i for group in layout.groups for i in group.layer_ids) == list(range(SPEC.layers))
    for layer in range(SPEC.layers):
        memory.keys[layer][:] = 2 * layer
        memory.values[layer][:] = 2 * layer + 1
    for group in layout.groups:
        assert layout.group(group.layer_group_id) is group
        assert group.bytes_per_page == len(group.layer_ids) * 2 * 2 * 8 * 4 * 2
        for region in group.regions:
            rows = region.as_tensor(torch.bfloat16).view(region.num_slots, len(region.buffers), -1)
            for place, ref in enumerate(region.buffers):
                assert set(rows[:, place].flatten().tolist()) == {2 * ref.layer_id + (ref.role == "value")}
            assert region.address_of(1) == region.as_tensor()[1].data_ptr()
            with pytest.raises(IndexError):
                region.address_of(-1)
    single = layout.as_single_pool_tensor()
    assert (single is not None) == (num_groups == 1)
    if single is not None:
        assert single.shape == (3, 5, 2, 2 * 8 * 4)
        assert single[1, 3, 1, 0] == 7


def test_settings_that_do_not_go_together_are_refused() -> None:
    for wrong in (
        {"version": "1.4"},
        {"version": "1.3", "layout": "groups"},
        {"version": "main", "window": 8},
        {"max_tokens_per_step": 8, "tokens_per_block": 16},
        {"num_blocks": 0},
    ):
        with pytest.raises(ValueError, match=r"."):
            EngineConfig(**wrong)  # type: ignore[arg-type]
