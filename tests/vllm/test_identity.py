"""What an engine's configuration makes of its namespace, and which engines are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvtier.errors import ConfigError, LayoutError
from kvtier.vllm import identity
from kvtier.vllm.identity import CANONICAL, EngineFacts, config_path

NAMES = [f"model.layers.{n}.self_attn" for n in (10, 2, 1)]
KV = {"block_size": 32, "num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}


class HfConfig(SimpleNamespace):
    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch, tmp_path):
    """Leave the CPU's own kernels out; the weights are a file."""
    monkeypatch.setattr(identity, "_on_cpu", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")


def engine(**changes: Any) -> SimpleNamespace:
    """Return what is read of vLLM's configuration; `changes` name the part and the setting."""
    parts: dict[str, Any] = {
        "parallel_config": {"tensor_parallel_size": 1, "world_size": 1, "rank": 0},
        "cache_config": {"cache_dtype": "auto", "calculate_kv_scales": False},
        "scheduler_config": {"enable_chunked_prefill": True},
        "load_config": {"load_format": "auto"},
        "kv_transfer_config": {"engine_id": "e", "kv_connector_extra_config": {}},
        "model_config": {
            "dtype": torch.bfloat16, "quantization": None, "model": ".", "model_weights": "",
            "revision": None, "max_model_len": 4096, "hf_text_config": HfConfig(rope_theta=10_000.0),
        },
    }  # fmt: skip
    for name, value in changes.items():
        part, key = name.split("__")
        parts[f"{part}_config"][key] = value
    made = {name: SimpleNamespace(**values) for name, values in parts.items()}
    return SimpleNamespace(speculative_config=None, **made)


def groups(*specs: Any) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(NAMES, spec) for spec in specs])


def read(config: SimpleNamespace | None = None, *specs: Any, mode: str = "external") -> EngineFacts:
    tiers = SimpleNamespace(agent=SimpleNamespace(mode=mode))
    return EngineFacts.read(config or engine(), groups(*(specs or (FullAttentionSpec(**KV),))), tiers)


def test_a_block_as_the_configuration_describes_it():
    facts = read()
    assert facts.layers == tuple(reversed(NAMES)), "in the order of the numbers"
    layout = facts.layout
    assert (layout.dtype, layout.tokens_per_block, layout.layers, layout.kv_factor) == ("bfloat16", 32, 3, 2)
    assert (layout.row_elements, layout.shards, facts.rows) == (2 * 32 * 64, 1, CANONICAL)


def test_ranks_have_a_shard_each_and_latents_are_stored_once():
    two = engine(parallel__tensor_parallel_size=2, parallel__world_size=2, parallel__rank=1)
    assert (read(two).layout.shards, read(two).rank) == (2, 1)
    latent = MLAAttentionSpec(**{**KV, "num_kv_heads": 1, "head_size": 576})
    assert (read(two, latent).layout.shards, read(two, latent).layout.row_elements) == (1, 32 * 576)


@pytest.mark.parametrize(
    "change",
    [
        {"parallel__tensor_parallel_size": 2, "parallel__world_size": 2},
        {"model__dtype": torch.float16},
        {"model__quantization": "fp8"},
        {"model__quantization_config": {"ignore": ["lm_head"]}},
        {"cache__cache_dtype": "fp8"},
        {"model__hf_text_config": HfConfig(rope_theta=500_000.0)},
        {"load__load_format": "dummy"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_bytes_changes_the_namespace(change):
    assert read(engine(**change)).namespace.id != read().namespace.id


def test_the_same_engine_again_has_the_same_namespace_and_another_session():
    other = read(engine(kv_transfer__engine_id="f", model__max_model_len=8192))
    assert other.namespace.id == read().namespace.id
    assert other.session != read().session


def test_other_weights_and_block_sizes_are_other_namespaces(tmp_path):
    first = read().namespace.id
    assert read(None, FullAttentionSpec(**{**KV, "block_size": 64})).namespace.id != first
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert read().namespace.id != first


@pytest.mark.parametrize(
    ("change", "specs", "message"),
    [
        ({"parallel__world_size": 2}, (), "pipeline and context parallelism"),
        ({"parallel__decode_context_parallel_size": 2}, (), "decode_context_parallel_size"),
        ({"cache__calculate_kv_scales": True}, (), "calculate_kv_scales"),
        ({"model__is_diffusion": True}, (), "diffusion models"),
        ({}, (FullAttentionSpec(**KV), SlidingWindowSpec(**KV, sliding_window=64)), "2 groups"),
        ({}, (SlidingWindowSpec(**KV, sliding_window=64),), "--disable-sliding-window"),
        ({}, (FullAttentionSpec(**KV, head_size_v=32),), "in K and 32 in V"),
        (
            {},
            (FullAttentionSpec(**KV, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD),),
            "more than the elements",
        ),
    ],
)
def test_refused(change, specs, message):
    with pytest.raises(LayoutError, match=message):
        read(engine(**change), *specs)


def test_drafts_of_another_model_are_refused_and_such_from_the_text_are_not():
    config = engine()
    for method in ("ngram", "suffix"):
        config.speculative_config = SimpleNamespace(method=method)
        read(config)
    for method in ("eagle3", "mtp", "draft_model"):
        config.speculative_config = SimpleNamespace(method=method)
        with pytest.raises(LayoutError, match=f"speculative decoding by {method}"):
            read(config)


def test_latents_on_a_cpu_are_refused_where_vllm_does_not_reuse_them(monkeypatch):
    monkeypatch.setattr(identity, "_on_cpu", lambda: True)
    latent = MLAAttentionSpec(**{**KV, "num_kv_heads": 1, "head_size": 576})
    with pytest.raises(LayoutError, match="MLA on this CPU"):
        read(engine(scheduler__enable_chunked_prefill=False), latent)


def test_ranks_need_an_agent():
    two = engine(parallel__tensor_parallel_size=2, parallel__world_size=2)
    with pytest.raises(ConfigError, match="inprocess serves an engine of one rank"):
        read(two, mode="inprocess")


def test_the_only_setting_of_the_connector_is_the_path():
    assert config_path(engine()) is None
    assert config_path(engine(kv_transfer__kv_connector_extra_config={"config": "a.yaml"})) == "a.yaml"
    for wrong in ({"confg": "a.yaml"}, {"config": 7}):
        with pytest.raises(ConfigError, match="kv_connector_extra_config"):
            config_path(engine(kv_transfer__kv_connector_extra_config=wrong))
