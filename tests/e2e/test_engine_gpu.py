"""The fast model computes what the exact one computes, as far as bfloat16 goes; on a GPU if there is one."""

from __future__ import annotations

import json
import random

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

from kvtier.engine import EngineConfig, GpuLlama, KVMemory, LlamaModel, Request, Span  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
HIDDEN, HEADS, KV_HEADS, DIM, INTERMEDIATE, VOCABULARY, LAYERS = 128, 4, 2, 32, 256, 300, 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small model with weights of the usual spread."""
    folder = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    weights = {"model.embed_tokens.weight": made(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for layer in range(LAYERS):
        parts = {
            "input_layernorm": torch.ones(HIDDEN),
            "self_attn.q_proj": made(HEADS * DIM, HIDDEN),
            "self_attn.k_proj": made(KV_HEADS * DIM, HIDDEN),
            "self_attn.v_proj": made(KV_HEADS * DIM, HIDDEN),
            "self_attn.o_proj": made(HIDDEN, HEADS * DIM),
            "post_attention_layernorm": torch.ones(HIDDEN),
            "mlp.gate_proj": made(INTERMEDIATE, HIDDEN),
            "mlp.up_proj": made(INTERMEDIATE, HIDDEN),
            "mlp.down_proj": made(HIDDEN, INTERMEDIATE),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": tensor for name, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors")
    config = {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(model, device: str, cuts: list[int], tokens: list[int], layout: str = "flat"):
    """Compute a prompt in chunks that end at `cuts`; returns the logits after each of them."""
    config = EngineConfig(
        num_blocks=16,
        tokens_per_block=8,
        kv_dtype="bfloat16",
        device=device,
        layout=layout,
        version="main" if layout == "groups" else "1.2",
    )
    memory = KVMemory(model.spec, config)
    pages = [random.Random(group).sample(range(16), 12) for group in range(len(memory.groups))]
    logits, start = [], 0
    for end in cuts:
        used = [ids[: -(-end // 8)] for ids in pages]
        span = Span(tokens, start, end, used, True, Request(tokens))
        logits.append(model.logits([span], memory, lambda _: None, lambda _: None)[0].float().cpu())
        start = end
    return torch.stack(logits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["flat", "groups"])
def test_it_agrees_with_the_exact_model_whole_and_in_chunks(directory, device, layout):
    tokens = [random.Random(3).randrange(VOCABULARY) for _ in range(90)]
    exact = run(LlamaModel(directory), "cpu", [37, 38, 80, 90], tokens)
    fast = GpuLlama.load(directory, device)
    chunked = run(fast, device, [37, 38, 80, 90], tokens, layout)
    whole = run(fast, device, [90], tokens, layout)
    spread = exact.std()
    assert (chunked - exact).abs().max() < 0.1 * spread
    assert (whole[0] - exact[-1]).abs().max() < 0.1 * spread
    assert torch.equal(chunked, run(fast, device, [37, 38, 80, 90], tokens, layout))


@pytest.mark.parametrize("device", DEVICES)
def test_requests_of_a_batch_do_not_see_each_other(directory, device):
    rng = random.Random(4)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in (20, 33)]
    fast = GpuLlama.load(directory, device)
    memory = KVMemory(fast.spec, EngineConfig(num_blocks=16, tokens_per_block=8, device=device))
    spans = [
        Span(prompt, 0, len(prompt), [list(range(first, first + 5))], sample, Request(prompt))
        for prompt, first, sample in zip(prompts, (0, 8), (False, True), strict=True)
    ]
    (token, logits) = fast.forward(spans, memory, int, int), fast.logits(spans, memory, int, int)
    alone = run(fast, device, [33], prompts[1])
    assert token == [None, int(logits[0].argmax())]
    assert (logits[0].float().cpu() - alone[0]).abs().max() < 0.1 * alone.std()
