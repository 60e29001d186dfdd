"""Blocks in and out of the engine's pools, and the pools that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvtier.engine import EngineConfig, KVMemory, ModelSpec
from kvtier.errors import LayoutError
from kvtier.trtllm import BrokenPromise
from kvtier.trtllm.identity import EngineFacts
from kvtier.trtllm.pool import FlatPool, GroupPool
from tests.trtllm_support import content, llm_args

SPEC = ModelSpec(layers=5, kv_heads=2, head_dim=8, vocab_size=100)


def facts(**changes: object) -> EngineFacts:
    return EngineFacts.read(llm_args(**changes))


def flat(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8]
)
@pytest.mark.parametrize("kv_factor", [1, 2])
def test_flat_blocks_come_back_bit_for_bit(dtype, kv_factor):
    raw = torch.randint(0, 256, (6, 3, kv_factor, 64 * dtype.itemsize), dtype=torch.uint8)
    pool = FlatPool(raw.view(dtype).view(6, 3, kv_factor, 64), facts())
    assert pool.layout.dtype == str(dtype).removeprefix("torch.")
    before = raw.clone()
    slot = torch.zeros(pool.layout.shard_bytes, dtype=torch.uint8)
    pool.copy_out((4,), slot)
    assert torch.equal(slot, before[4].flatten())
    pool.copy_in(slot, (1,))
    assert torch.equal(raw[1], before[4])
    assert torch.equal(raw[[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("page", [-1, -2, 6, 1 << 40])
def test_pages_that_are_none_are_never_touched(page):
    pool = FlatPool(flat(6, 3, 2, 64), facts())
    slot = torch.zeros(pool.layout.shard_bytes, dtype=torch.uint8)
    with pytest.raises(IndexError):
        pool.copy_out((page,), slot)
    with pytest.raises(BrokenPromise):
        pool.copy_in(slot, (page,))


@pytest.mark.parametrize(
    ("tensor", "changes", "says"),
    [
        (flat(6, 3, 2, 64), {"kv_cache_config__host_cache_size": 1 << 30}, "host_cache_size"),
        (flat(6, 3, 2, 64), {"kv_cache_config__disk_cache_size": 1}, "disk_cache_size"),
        (flat(6, 3, 2, 64), {"kv_cache_config__dtype": "nvfp4"}, "NVFP4"),
        (
            flat(6, 3, 2, 64),
            {"quant_config": SimpleNamespace(quant_algo="NVFP4", kv_cache_quant_algo="NVFP4")},
            "NVFP4",
        ),
        (flat(6, 3, 2), {}, "shape"),
        (flat(6, 3, 3, 64), {}, "3 parts"),
        (flat(6, 3, 2, 63), {}, "tokens_per_block"),
        (flat(6, 3, 2, 64).transpose(0, 1), {}, "not contiguous"),
        (flat(6, 3, 2, 64, dtype=torch.int64), {}, "int64"),
    ],
)
def test_flat_pools_that_are_refused(tensor, changes, says):
    with pytest.raises(LayoutError, match=says):
        FlatPool(tensor, facts(**changes))


def test_a_pool_without_all_layers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 4}')
    with pytest.raises(LayoutError, match=r"3 layers.*has 4"):
        FlatPool(flat(6, 3, 2, 64), facts(model=str(tmp_path)))
    assert FlatPool(flat(6, 4, 2, 64), facts(model=str(tmp_path))).layout.layers == 4
    # With pipeline stages a rank has only its own layers.
    assert FlatPool(flat(6, 3, 2, 64), facts(model=str(tmp_path), pipeline_parallel_size=2))


def memory(**changes: object) -> KVMemory:
    config = EngineConfig(
        num_blocks=6, tokens_per_block=4, version="main", layout="groups", **{"num_groups": 2, **changes}
    )
    return KVMemory(SPEC, config)


def pages_of(memory: KVMemory, group: int, page: int) -> torch.Tensor:
    regions = memory.layout.groups[group].regions
    return torch.cat([region.as_tensor()[page] for region in regions])


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize(
    "by_address",
    [False, pytest.param(True, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs no GPU"))],
)
def test_grouped_blocks_come_back_bit_for_bit(num_groups, by_address):
    source = memory(num_groups=num_groups)
    for group, count in enumerate(source.num_pages):
        for region in source.layout.groups[group].regions:
            for page in range(count):
                region.as_tensor()[page].copy_(content((group, page, region.base), region.size))
    layout = source.layout
    if by_address:
        # As upstream's own view on a machine without a GPU: it cannot be made, the addresses can be used.
        layout = described(layout)
    pool = GroupPool(layout, facts())
    pages = tuple(range(1, 1 + num_groups))
    targets = tuple(page + 2 for page in pages)
    slot = torch.zeros(pool.layout.shard_bytes, dtype=torch.uint8)
    pool.copy_out(pages, slot)
    pool.copy_in(slot, targets)
    for group in range(num_groups):
        assert torch.equal(pages_of(source, group, targets[group]), pages_of(source, group, pages[group]))
    assert (pool.layout.dtype, pool.layout.layers, pool.layout.kind) == ("uint8", 1, "groups")


def described(layout, **changes):
    """Return a description of the same memory whose regions give no view."""

    def no_view(self, dtype=torch.uint8):
        raise RuntimeError("no CUDA")

    region = type("Region", (SimpleNamespace,), {"as_tensor": no_view})
    fields = ("base", "size", "stride", "num_slots", "buffers")
    groups = tuple(
        SimpleNamespace(
            layer_group_id=group.layer_group_id,
            layer_ids=group.layer_ids,
            window_size=group.window_size,
            regions=tuple(region(**{f: getattr(r, f) for f in fields}) for r in group.regions),
        )
        for group in layout.groups
    )
    return SimpleNamespace(**{"tokens_per_block": layout.tokens_per_block, "groups": groups, **changes})


def test_groups_without_a_page_are_skipped_when_loading_and_an_error_when_saving():
    pool = GroupPool(memory().layout, facts())
    slot = torch.ones(pool.layout.shard_bytes, dtype=torch.uint8)
    pool.copy_in(slot, (2, -1))
    with pytest.raises(IndexError):
        pool.copy_out((2, -1), slot)
    with pytest.raises(BrokenPromise):
        pool.copy_in(slot, (2, 1000))
    with pytest.raises(ValueError, match="zip"):
        pool.copy_in(slot, (2,))


def test_uniform_pages_are_known_as_rows_of_keys_and_values():
    pool = GroupPool(memory().layout, facts(kv_cache_config__dtype="bfloat16"))
    assert pool.layout.dtype == "bfloat16"
    assert (pool.layout.layers, pool.layout.kv_factor, pool.layout.row_elements) == (5, 2, 2 * 4 * 8)
    assert [group.id for group in pool.groups] == [0, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="host addresses count only without a GPU")
def test_the_description_itself_may_tell_the_dtype():
    layout = described(memory().layout, dtype=torch.bfloat16)
    assert GroupPool(layout, facts()).layout.dtype == "bfloat16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="host addresses count only without a GPU")
def test_replicated_regions_belong_to_the_block():
    layout = described(memory(num_groups=1).layout)
    spare = torch.arange(6 * 16, dtype=torch.uint8)
    group = layout.groups[0]
    group.replicated_regions = (
        SimpleNamespace(base=spare.data_ptr(), size=16, stride=16, num_slots=6, buffers=()),
    )
    pool = GroupPool(layout, facts(kv_cache_config__dtype="bfloat16"))
    assert pool.layout.dtype == "uint8"
    slot = torch.zeros(pool.layout.shard_bytes, dtype=torch.uint8)
    pool.copy_out((3,), slot)
    assert torch.equal(slot[-16:], spare[48:64])


def test_tokens_per_block_come_from_the_pool_where_the_arguments_do_not_say():
    nothing = EngineFacts.read(SimpleNamespace())
    assert GroupPool(memory().layout, nothing).layout.tokens_per_block == 4
    assert FlatPool(flat(6, 3, 2, 64), nothing).layout.tokens_per_block == 32


def test_a_window_is_known():
    assert [g.window for g in GroupPool(memory(window=8).layout, facts()).groups] == [None, 8]


def test_grouped_pools_that_are_refused():
    layout = memory().layout
    with pytest.raises(LayoutError, match="host_cache_size"):
        GroupPool(layout, facts(kv_cache_config__host_cache_size=1))
    with pytest.raises(LayoutError, match=r"4 tokens per page.*says 8"):
        GroupPool(layout, facts(kv_cache_config__tokens_per_block=8))
    with pytest.raises(LayoutError, match="no pages"):
        GroupPool(described(layout, groups=()), facts())
    odd = described(layout)
    odd.groups[1].regions[0].buffers = (SimpleNamespace(layer_id=3, role="key", expansion=2),)
    with pytest.raises(LayoutError, match="expansion 2"):
        GroupPool(odd, facts())


def test_pools_arranged_differently_have_different_signatures():
    signatures = [GroupPool(memory(num_groups=n).layout, facts()).signature for n in (1, 2, 3)]
    windowed = GroupPool(memory(window=8).layout, facts()).signature
    assert all(signatures.count(s) == 1 for s in signatures)
    assert windowed not in signatures
