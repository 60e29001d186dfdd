"""Other shapes than the real model's: block sizes, element types, windows, adapters.

What an engine says with the prefix from its own cache it must say with the prefix from kvtier, which is the
same bytes and the same arithmetic in whatever type.
"""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from tests.s3_support import eventually
from tests.vllm.engine import EngineProcess, prompt
from tests.vllm.models import adapter, model

pytestmark = pytest.mark.timeout(600)

MLA = {
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "q_lora_rank": None, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 64,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 3, "head_dim": 64,
    "num_key_value_heads": 4,
}  # fmt: skip
CASES = {
    "blocks of 64": {"block_size": 64},
    "blocks of 128, bfloat16": {"block_size": 128, "dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "8-bit KV": {"kv_cache_dtype": "fp8"},
    "no prefix cache of its own": {"enable_prefix_caching": False},
    "every other layer with a window": {"kind": "Gemma2", "sliding_window": 64, "query_pre_attn_scalar": 64},
    "no longer than the window": {"kind": "Mistral", "sliding_window": 512, "disable_sliding_window": True},
}


@pytest.fixture
def start(place, tmp_path):
    started = []
    config = tmp_path / "kvtier.yaml"
    config.write_text("memory: {size: 256MiB}\nagent: {mode: inprocess}\n")

    def begin(**options):
        started.append(EngineProcess(config, tmp_path / "engine.log", max_model_len=512, **options))
        return started[-1]

    yield begin
    for engine in started:
        engine.kill()


@pytest.mark.parametrize("name", CASES)
def test_same_words_from_either_cache(name, start, tmp_path):
    options = dict(CASES[name])
    kind = options.pop("kind", "Llama")
    shape = {key: options.pop(key) for key in ("sliding_window", "query_pre_attn_scalar") if key in options}
    engine = start(model=model(tmp_path, kind, **shape), **options)
    size = options.get("block_size", 32)
    prompts = [prompt(f"{name} {n}", 3 * size + 7 * n + 1) for n in range(4)]
    cold = [engine.generate([tokens], 12)[0] for tokens in prompts]
    own = [engine.generate([tokens], 12)[0] for tokens in prompts]
    assert len({tuple(words) for words in own}) == len(prompts), "the prompts do not matter to this model"
    if options.get("enable_prefix_caching", True):
        assert engine.ask("counts").get("loaded_tokens", 0) == 0
        engine.ask("forget")
        assert [engine.generate([tokens], 12)[0] for tokens in prompts] == own
    if "dtype" not in options:
        assert own == cold
    counts = engine.ask("counts")
    assert counts["loaded_tokens"] == counts["vllm_external_hits"] == len(prompts) * 3 * size
    assert counts["worker"].get("load_failed_blocks", 0) == 0


def test_adapters_do_not_share_blocks(start, tmp_path):
    base = model(tmp_path)
    engine = start(model=base, enable_lora=True, max_loras=2, max_lora_rank=8)
    tokens = prompt("adapted", 4 * 32 + 5)
    adapters = [None, adapter(tmp_path, base, 1), adapter(tmp_path, base, 2)]

    def say(path):
        engine.ask("forget")
        return engine.ask("generate", prompts=[tokens], max_tokens=8, adapter=path)

    cold = [say(path) for path in adapters]
    assert len({str(words) for words in cold}) == 3
    for path, words in zip(adapters, cold, strict=True):

        def loads(path=path, words=words):
            before = engine.ask("counts").get("loaded_tokens", 0)
            assert say(path) == words
            return engine.ask("counts").get("loaded_tokens", 0) == before + 4 * 32

        # Nothing is cached under an adapter before its files have been read.
        eventually(loads, 180)


REFUSED = {
    "SlidingWindowSpec is not supported": {"kind": "Mistral", "sliding_window": 64},
    "MLA on this CPU is not supported": {"kind": "DeepseekV2", **MLA},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message, start, tmp_path):
    with pytest.raises(AssertionError, match=message):
        start(model=model(tmp_path, **REFUSED[message])).ask("ready")
