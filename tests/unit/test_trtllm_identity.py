"""Which models and engines share KV, and which do not."""

from __future__ import annotations

import json
import shutil
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from kvtier.connector import weights
from kvtier.connector.weights import model_config, model_facts
from kvtier.layout import BlockLayout
from kvtier.trtllm.identity import EngineFacts
from tests.trtllm_support import llm_args

LAYOUT = BlockLayout("bfloat16", 32, 2, 2, 1024)
POOL = {"kind": "flat"}


def make_model(directory: Path, weight: bytes = b"w" * 1000, **config: object) -> str:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "hidden_size": 8, **config}))
    (directory / "model.safetensors").write_bytes(weight)
    return str(directory)


def namespace(layout: BlockLayout = LAYOUT, pool=POOL, **changes: object) -> bytes:
    return EngineFacts.read(llm_args(**changes)).namespace(layout, pool).id


def test_the_same_model_in_two_places_is_the_same(tmp_path):
    first, second = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    assert namespace(model=first) == namespace(model=second) == namespace(model=Path(second))


def test_what_a_save_changes_without_meaning_does_not_matter(tmp_path):
    first = make_model(tmp_path / "a", transformers_version="4.1", _name_or_path="x")
    second = make_model(tmp_path / "b", transformers_version="4.2", _name_or_path="y")
    assert namespace(model=first) == namespace(model=second)


@pytest.mark.parametrize(
    "change", ["config", "weight", "size", "index", "quantization", "pictures", "another file"]
)
def test_a_model_that_differs_anywhere_is_another(tmp_path, change):
    first, second = make_model(tmp_path / "a"), make_model(tmp_path / "b")
    other = tmp_path / "b"
    if change == "config":
        make_model(other, rope_theta=5.0)
    elif change == "weight":
        make_model(other, b"w" * 999 + b"x")
    elif change == "size":
        make_model(other, b"w" * 1001)
    elif change == "index":
        (other / "model.safetensors.index.json").write_text("{}")
    elif change == "quantization":
        (other / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    elif change == "pictures":
        (other / "preprocessor_config.json").write_text('{"max_pixels": 1}')
    else:
        (other / "more.bin").write_bytes(b"1")
    assert namespace(model=first) != namespace(model=second)


@pytest.mark.parametrize("place", ["head", "middle", "tail"])
def test_large_files_are_told_apart_by_samples(tmp_path, monkeypatch, place):
    small_samples(monkeypatch)
    size = 100_000
    first = make_model(tmp_path / "a", bytes(size))
    # A fine-tune: the same header and size, other values in a stretch as long as a tensor.
    start = {"head": 400, "middle": 40_000, "tail": size - 60}[place]
    changed = bytearray(size)
    changed[start : start + 2000] = b"x" * len(changed[start : start + 2000])
    second = make_model(tmp_path / "b", bytes(changed))
    assert model_facts(first, None) != model_facts(second, None)
    assert model_facts(first, None) == model_facts(shutil.copytree(first, tmp_path / "c").as_posix(), None)


def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(weights, "WHOLE_TENSOR_BYTES", 200)
    monkeypatch.setattr(weights, "SAMPLE_BYTES", 50)
    monkeypatch.setattr(weights, "STEP_BYTES", 1500)


def safetensors(tensors: dict[str, bytes]) -> bytes:
    header, start = {}, 0
    for name, data in tensors.items():
        offsets = [start, start + len(data)]
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": offsets}
        start += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


@pytest.mark.parametrize("changed", ["k_scale", "bias", "norm", "v_proj", "embed"])
def test_no_tensor_of_a_large_file_is_overlooked(tmp_path, monkeypatch, changed):
    """A new calibration changes scales alone, and some fine-tunes only biases or a single layer."""
    small_samples(monkeypatch)
    sizes = {"embed": 1_000_000, "k_scale": 4, "v_proj": 3000, "bias": 64, "mlp": 2_000_000, "norm": 128}
    before = {name: name[:1].encode() * size for name, size in sizes.items()}
    first = make_model(tmp_path / "a", safetensors(before))
    second = make_model(tmp_path / "b", safetensors({**before, changed: b"+" * sizes[changed]}))
    assert model_facts(first, None) != model_facts(second, None)
    assert model_facts(first, None) == model_facts(make_model(tmp_path / "c", safetensors(before)), None)


@pytest.mark.parametrize(
    "data",
    [
        (1 << 60).to_bytes(8, "little") + b"x" * 9000,
        (30).to_bytes(8, "little") + b"{" + b" " * 9000,
        (2).to_bytes(8, "little") + b"[]" + b"x" * 9000,
        (34).to_bytes(8, "little") + b'{"a": {"data_offsets": [0, "1"]}}' + b"x" * 9000,
        (40).to_bytes(8, "little") + b'{"a": {"data_offsets": [-5, 99999999]}} ' + b"x" * 9000,
    ],
)
def test_a_file_that_only_looks_like_safetensors_is_sampled_like_any_other(tmp_path, monkeypatch, data):
    small_samples(monkeypatch)
    first = make_model(tmp_path / "a", data)
    second = make_model(tmp_path / "b", data[:-20] + b"y" * 20)
    assert "weights" in model_facts(first, None)
    assert model_facts(first, None) != model_facts(second, None)


def test_weights_changed_in_place_are_noticed(tmp_path):
    model = make_model(tmp_path / "a")
    before = namespace(model=model)
    make_model(tmp_path / "a", b"v" * 1000)
    assert namespace(model=model) != before


def test_a_single_weight_file_is_a_model(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    facts = model_facts(str(file), None)
    assert facts["weights"]["model.gguf"]["bytes"] == 104
    file.write_bytes(b"GGUF" + bytes(99) + b"1")
    assert model_facts(str(file), None) != facts


def test_a_hub_name_is_identified_by_its_local_snapshot(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    stored = tmp_path / "models--org--name"
    make_model(stored / "snapshots" / "abc123", num_hidden_layers=7)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc123")
    facts = model_facts("org/name", None)
    assert facts["revision"] == "abc123"
    assert facts == model_facts("org/name", "abc123")
    assert model_config("org/name", None)["num_hidden_layers"] == 7
    assert "weights" not in model_facts("org/name", "other")


def test_the_cache_of_the_hub_is_found_where_its_variables_say(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    places = {
        "XDG_CACHE_HOME": "huggingface/hub",
        "HF_HOME": "hub",
        "HUGGINGFACE_HUB_CACHE": ".",
        "HF_HUB_CACHE": ".",
    }
    # Each goes before those above.
    for layers, (name, below) in enumerate(places.items(), 1):
        stored = tmp_path / name / below / "models--org--name"
        make_model(stored / "snapshots" / "abc", num_hidden_layers=layers)
        (stored / "refs").mkdir()
        (stored / "refs" / "main").write_text("abc")
        monkeypatch.setenv(name, str(tmp_path / name))
        assert model_config("org/name", None)["num_hidden_layers"] == layers


def test_names_without_files_are_told_apart_by_name_and_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    commits, branches = ("0" * 40, "1" * 40), (None, "main")
    here = {(m, r): namespace(model=m, revision=r) for m in ("a/b", "a/c") for r in (*commits, *branches)}
    assert len(set(here.values())) == 8
    monkeypatch.setattr(weights, "_PRIVATE", "another process")
    # A branch may have other weights there, or tomorrow.
    for (model, revision), known in here.items():
        assert (namespace(model=model, revision=revision) == known) is (revision in commits)


def test_a_directory_without_weights_is_private(tmp_path, monkeypatch):
    for name in ("a", "b"):
        make_model(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
    here = namespace(model=str(tmp_path / "a"))
    assert here != namespace(model=str(tmp_path / "b"))
    monkeypatch.setattr(weights, "_PRIVATE", "another process")
    assert here != namespace(model=str(tmp_path / "a"))


def test_without_a_model_the_kv_is_private_to_the_process(monkeypatch):
    here = namespace(model=None)
    assert here == namespace(model=None) == namespace(model=MagicMock())
    monkeypatch.setattr(weights, "_PRIVATE", "another process")
    assert namespace(model=None) != here


def test_unreadable_files_make_the_kv_private(tmp_path, monkeypatch):
    model = make_model(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("{broken")
    assert "private" in model_facts(model, None)
    assert model_config(model, None) == {}


@pytest.mark.parametrize(
    ("scaling", "same"),
    [({"type": "longrope"}, False), ({"rope_type": "dynamic"}, False), ({"rope_type": "yarn"}, True)],
)
def test_the_longest_sequence_counts_where_rope_goes_by_it(tmp_path, scaling, same):
    model = make_model(tmp_path / "a", rope_scaling=scaling)
    short, long = (namespace(model=model, max_seq_len=length) for length in (4096, 8192))
    assert (short == long) is same


class LoadFormat(Enum):
    AUTO = 0
    DUMMY = 1


def test_random_weights_are_private_whatever_the_files_say(tmp_path, monkeypatch):
    model = make_model(tmp_path / "a")
    real = namespace(model=model)
    assert namespace(model=model, load_format=LoadFormat.AUTO) == real
    random = namespace(model=model, load_format=LoadFormat.DUMMY)
    assert random == namespace(model=model, load_format="dummy") != real
    monkeypatch.setattr(weights, "_PRIVATE", "another process")
    assert namespace(model=model, load_format=LoadFormat.DUMMY) != random


class QuantAlgo(str, Enum):
    FP8 = "FP8"


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"attn_backend": "FLASHINFER"},
        {"tensor_parallel_size": 2},
        {"model_kwargs": {"rope_theta": 1}},
        {"load_format": "dummy"},
        {"kv_cache_config__max_attention_window": [4096]},
        {"quant_config": SimpleNamespace(quant_algo=QuantAlgo.FP8, kv_cache_quant_algo=None)},
        {"quant_config": SimpleNamespace(quant_algo=None, kv_cache_quant_algo=QuantAlgo.FP8)},
        {"kv_cache_config__dtype": "fp8"},
        {"layout": BlockLayout("float16", 32, 2, 2, 1024)},
        {"layout": BlockLayout("bfloat16", 64, 2, 2, 1024)},
        {"layout": BlockLayout("bfloat16", 32, 1, 2, 2048)},
        {"pool": {"kind": "groups"}},
    ],
)
def test_an_engine_that_writes_other_bytes_has_its_own_namespace(changes):
    assert namespace(**changes) != namespace()


def quantized(**details):
    return namespace(quant_config=SimpleNamespace(quant_algo=QuantAlgo.FP8, **details))


def test_how_weights_are_quantized_counts_and_what_says_nothing_does_not():
    other = [
        quantized(),
        quantized(group_size=64),
        quantized(group_size=128),
        quantized(exclude_modules=["lm_head"]),
        quantized(exclude_modules=["lm_head", "*.self_attn.k_proj"]),
        quantized(clamp_val=[-1.0, 1.0]),
        quantized(pre_quant_scale=True),
        namespace(model_kwargs={"torch_dtype": torch.float16}),
        namespace(model_kwargs={"torch_dtype": torch.bfloat16}),
        namespace(force_dynamic_quantization=True),
        namespace(),
    ]
    assert len(set(other)) == len(other)
    assert quantized(exclude_modules=None, has_zero_point=False, clamp_val=None) == quantized()
    # Nothing is quantized: the rest are defaults.
    off = SimpleNamespace(quant_algo=None, kv_cache_quant_algo=None, group_size=128, smoothquant_val=0.5)
    assert namespace(quant_config=off) == namespace()


def test_saying_the_dtype_that_auto_means_changes_nothing():
    assert namespace(kv_cache_config__dtype="bfloat16") == namespace(kv_cache_config__dtype="torch.bfloat16")
    assert (
        namespace(kv_cache_config__dtype="bfloat16")
        == namespace(kv_cache_config__dtype="auto")
        == namespace()
    )


@pytest.mark.parametrize(
    "arguments", [MagicMock(), SimpleNamespace(), None, SimpleNamespace(kv_cache_config=None)]
)
def test_arguments_of_any_shape_are_read_as_far_as_they_make_sense(arguments):
    facts = EngineFacts.read(arguments)
    assert (facts.tokens_per_block, facts.ranks, facts.kv_dtype, facts.host_cache_bytes) == (None, 1, None, 0)
    assert facts.plain_ranks
    assert facts.attention_layers is None
    facts.refuse_unsupported()


def test_ranks_are_the_most_that_anything_tells():
    assert EngineFacts.read(llm_args(parallel_config=SimpleNamespace(world_size=4))).ranks == 4
    assert not EngineFacts.read(llm_args(pipeline_parallel_size=2)).plain_ranks


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, 2),
        ({"text_config": {"num_hidden_layers": 5}}, 5),
        ({"layer_types": ["full_attention", "linear_attention", "sliding_attention"]}, 2),
        ({"hybrid_override_pattern": "M*M"}, None),
    ],
)
def test_attention_layers_are_counted_where_they_are_known(tmp_path, config, layers):
    facts = EngineFacts.read(llm_args(model=make_model(tmp_path / "a", **config)))
    assert facts.attention_layers == layers


def test_the_checkpoint_says_what_auto_means_for_the_kv_cache(tmp_path):
    model = make_model(tmp_path / "a")
    (tmp_path / "a" / "hf_quant_config.json").write_text('{"quantization": {"kv_cache_quant_algo": "FP8"}}')
    assert EngineFacts.read(llm_args(model=model)).kv_dtype == "float8_e4m3fn"
