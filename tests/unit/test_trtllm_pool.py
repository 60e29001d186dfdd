"""Blocks in and out of the engine's pools, and the pools that are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtier.connector.transfer import Blocks, RawMover
from kvtier.engine import EngineConfig, KVMemory, ModelSpec
from kvtier.errors import LayoutError
from kvtier.gpu.copies import copy_on_host
from kvtier.gpu.ranges import PageMap, Region
from kvtier.trtllm import pool
from kvtier.trtllm.identity import EngineFacts
from kvtier.trtllm.pool import FlatPool, GroupPool
from tests.trtllm_support import SIZE, content, llm_args

SPEC = ModelSpec(layers=5, kv_heads=2, head_dim=8, vocab_size=100)


def facts(**changes: object) -> EngineFacts:
    return EngineFacts.read(llm_args(**changes))


def flat(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def blocks(slots: list[torch.Tensor], pages: list[tuple[int, ...]]) -> Blocks:
    return Blocks(np.array([slot.data_ptr() for slot in slots], dtype=np.uint64), pages)


def copy_out(pool, pages: tuple[int, ...], slot: torch.Tensor) -> None:
    RawMover(pool.map, copy_on_host).save(blocks([slot], [pages]), 0)


def copy_in(pool, slot: torch.Tensor, pages: tuple[int, ...]) -> None:
    RawMover(pool.map, copy_on_host).load(blocks([slot], [pages]), 0)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.uint8]
)
@pytest.mark.parametrize("kv_factor", [1, 2])
def test_flat_blocks_come_back_bit_for_bit(dtype, kv_factor):
    raw = torch.randint(0, 256, (6, 3, kv_factor, 64 * dtype.itemsize), dtype=torch.uint8)
    pool = FlatPool(raw.view(dtype).view(6, 3, kv_factor, 64), facts())
    assert pool.layout.dtype == str(dtype).removeprefix("torch.")
    assert pool.replicated == (kv_factor == 1)
    before = raw.clone()
    slot = torch.zeros(pool.layout.shard_bytes, dtype=torch.uint8)
    copy_out(pool, (4,), slot)
    assert torch.equal(slot, before[4].flatten())
    copy_in(pool, slot, (1,))
    assert torch.equal(raw[1], before[4])
    assert torch.equal(raw[[0, 2, 3, 4, 5]], before[[0, 2, 3, 4, 5]])


@pytest.mark.parametrize("page", [-1, -2, 6, 1 << 40])
def test_pages_that_are_none_are_never_touched(page):
    pool = FlatPool(flat(6, 3, 2, 64), facts())
    slot = torch.zeros(pool.layout.shard_bytes, dtype=torch.uint8)
    with pytest.raises(IndexError):
        copy_out(pool, (page,), slot)
    with pytest.raises(IndexError):
        copy_in(pool, slot, (page,))


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


def test_flash_mla_has_more_tokens_in_a_block_than_the_arguments_say(tmp_path):
    """The engine then sets 64 and leaves its arguments as they were: pages would get others' hashes."""
    config = '{"num_hidden_layers": 3, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "num_attention_heads": 4}'
    (tmp_path / "config.json").write_text(config)
    arguments = {"model": str(tmp_path), "kv_cache_config__tokens_per_block": 32}
    assert FlatPool(flat(6, 3, 1, 64 * 12), facts(**arguments)).layout.tokens_per_block == 64
    assert FlatPool(flat(6, 3, 1, 32 * 12), facts(**arguments)).layout.tokens_per_block == 32


@pytest.mark.parametrize(
    ("config", "ranks"),
    [
        ({"head_dim": 16, "num_key_value_heads": 4, "num_attention_heads": 8}, 1),
        ({"head_dim": 16, "num_key_value_heads": 4}, 2),
        ({"hidden_size": 128, "num_attention_heads": 8}, 8),
        ({"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2}, 8),
    ],
)
def test_a_pool_with_other_blocks_than_the_arguments_say_is_refused(tmp_path, config, ranks):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 3, **config}))
    arguments = {"model": str(tmp_path), "tensor_parallel_size": ranks}
    elements = 16 * -(-config.get("num_key_value_heads", config.get("num_attention_heads")) // ranks)
    assert FlatPool(flat(6, 3, 2, SIZE * elements), facts(**arguments)).layout.tokens_per_block == SIZE
    with pytest.raises(LayoutError, match=f"{2 * SIZE} tokens.*tokens_per_block says {SIZE}"):
        FlatPool(flat(6, 3, 2, 2 * SIZE * elements), facts(**arguments))


def test_a_flat_pool_under_a_sliding_window_is_refused():
    window = {"kv_cache_config__max_attention_window": [256]}
    for changes in (window, {**window, "max_seq_len": 257}):
        with pytest.raises(LayoutError, match="max_attention_window is 256"):
            FlatPool(flat(6, 3, 2, 64), facts(**changes))
    assert FlatPool(flat(6, 3, 2, 64), facts(**window, max_seq_len=256))


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
    copy_out(pool, pages, slot)
    copy_in(pool, slot, targets)
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
    copy_in(pool, slot, (2, -1))
    copy_in(pool, slot, (-1, -1))
    with pytest.raises(IndexError):
        copy_out(pool, (2, -1), slot)
    for pages in ((2, 1000), (2, -2)):
        with pytest.raises(IndexError):
            copy_in(pool, slot, pages)
    with pytest.raises(ValueError, match="1 pages for 2 groups"):
        copy_in(pool, slot, (2,))


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
    copy_out(pool, (3,), slot)
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


@given(st.data())
def test_ranges_cover_the_bytes_of_all_blocks_and_no_others(data):
    """Any regions, groups, pages and slots: the same bytes as block by block, byte by byte."""
    groups = data.draw(st.integers(1, 3))
    pages = [data.draw(st.integers(1, 9)) for _ in range(groups)]
    base, regions = 1000, []
    for group in [*range(groups), *data.draw(st.lists(st.integers(0, groups - 1), max_size=3))]:
        size = data.draw(st.sampled_from([1, 8, 24]))
        stride = size + data.draw(st.sampled_from([0, 0, 5]))
        regions.append(Region(group, base, stride, size, pages[group]))
        base += stride * pages[group]
    sparse = data.draw(st.booleans())
    page_map = PageMap(regions, groups, sparse=sparse)
    count = data.draw(st.integers(0, 20))
    wanted = [
        tuple(data.draw(st.integers(-1 if sparse else 0, limit - 1)) for limit in pages) for _ in range(count)
    ]
    step = page_map.block_bytes + data.draw(st.sampled_from([0, 3]))
    order = data.draw(st.permutations(range(count)))
    slots = [5000 + place * step for place in order]
    expected = {}
    for slot, ids in zip(slots, wanted, strict=True):
        for region in regions:
            for byte in range(region.size):
                if ids[region.group] >= 0:
                    address = region.base + region.stride * ids[region.group] + byte
                    expected.setdefault(slot, address)
                    assert expected[slot] == address
                slot += 1
    pool, host, sizes = page_map.ranges(np.array(slots, dtype=np.uint64), wanted, whole=False)
    found = {}
    for source, target, size in zip(pool.tolist(), host.tolist(), sizes.tolist(), strict=True):
        for byte in range(size):
            assert target + byte not in found
            found[target + byte] = source + byte
    assert found == expected


def test_blocks_that_follow_on_each_other_are_one_copy():
    page_map = PageMap([Region(0, 1 << 20, 64, 64, 100)], 1)
    pages = [3, 4, *range(6, 30)]
    slots = np.array([0, 64, 128, *range(256, 256 + 23 * 64, 64)], dtype=np.uint64) + np.uint64(1 << 30)
    pool, host, sizes = page_map.ranges(slots, [(page,) for page in pages])
    assert sizes.tolist() == [128, 64, 23 * 64]
    assert pool.tolist() == [(1 << 20) + 64 * page for page in (3, 6, 7)]
    assert host.tolist() == [(1 << 30) + offset for offset in (0, 128, 256)]


@pytest.mark.parametrize("blocks", [3, 30])
def test_pages_that_there_are_not_are_refused_whatever_their_number(blocks):
    page_map = PageMap([Region(0, 1 << 20, 64, 64, 100)], 1)
    slots = np.arange(blocks, dtype=np.uint64) * np.uint64(64)
    for wrong in (-1, -2, 100):
        with pytest.raises(IndexError, match=f"page {wrong} is wanted, its pool has 100"):
            page_map.ranges(slots, [*[(1,)] * (blocks - 1), (wrong,)])
        with pytest.raises(IndexError):
            page_map.ranges(slots, [*[(1,)] * (blocks - 1), (wrong,)], whole=False)
    with pytest.raises(ValueError, match=r"reshape|2 pages for 1 groups"):
        page_map.ranges(slots, [*[(1,)] * (blocks - 1), (1, 1)])


def test_no_copy_spans_two_regions():
    """They may be allocations of their own that lie side by side by chance."""
    page_map = PageMap([Region(0, 1 << 20, 64, 64, 4), Region(0, (1 << 20) + 256, 64, 64, 4)], 1)
    _, _, sizes = page_map.ranges(np.array([4096], dtype=np.uint64), [(3,)])
    assert sizes.tolist() == [64, 64]


@pytest.mark.parametrize(
    ("told", "kv_factor", "row", "found"),
    [(64, 2, 3 * 64 * SIZE, 64), (None, 2, 3 * 64 * SIZE, 64), (None, 2, 8 * 128 * SIZE, 128),
     (100, 2, 8 * 128 * SIZE, 128), (None, 2, 7 * SIZE, 0), (128, 1, 576 * SIZE, 576)],
)  # fmt: skip
def test_heads_are_as_the_model_says_or_guessed(told, kv_factor, row, found):
    assert pool._head_dim(SimpleNamespace(head_dim=told), kv_factor, row, SIZE) == found
