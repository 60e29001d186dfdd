"""Time to first token of vLLM 0.25 on a GPU: without a cache, and with kvtier cold, and warm from each tier.

The machine needs no network: the bundle has vLLM, the model is a shape with random weights. Run as

    python bench/vllm_gpu.py --bundle BUNDLE.txz --shape 8b --tokens 2000 8000
    python bench/vllm_gpu.py --bundle BUNDLE.txz --shape 1b --weights --tokens 8000 --compared 8

Where prompts are compared, outputs, their log probabilities and the bytes in the KV pool are, with kvtier and
without it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

from vllm_engines import BLOCK, FastServer, Node, new_prompt, run_table, wait_for

from tests.vllm.engine import EngineProcess

SHAPES = {
    "1b": (2048, 8192, 16, 32, 8, 64),
    "8b": (4096, 14336, 32, 32, 8, 128),
}
"""Hidden size, intermediate size, layers, heads, K/V heads, head size."""

_OUTPUT = 64
_START_SECONDS = 240.0
_POOLS = {"1b": 2 << 30, "8b": 4 << 30}


class CheckedEngine(EngineProcess):
    """An engine that tells what its pool holds."""

    module = "bench.vllm_checked"


_WEIGHTS = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16)
model.save_pretrained(sys.argv[1])
"""


def unpack(bundle: Path) -> dict[str, str]:
    """Unpack the bundle and return the environment that vLLM needs."""
    place = Path(tempfile.gettempdir()) / "kvtier-bench-vllm"
    if not place.is_dir():
        with tarfile.open(bundle) as tar:
            tar.extractall(place, filter="data")
    paths = [str(place / "site"), str(place / "deps"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def make_model(place: Path, shape: str, weights: bool) -> Path:
    """Write a Llama-shaped model, its weights random and the same each time, or none."""
    hidden, inner, layers, heads, kv_heads, head_dim = SHAPES[shape]
    place.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "mlp_bias": False,
    }
    (place / "config.json").write_text(json.dumps(config))
    if not weights:
        # Blocks of a model without weight files are private to its engine, and never go to the bucket.
        (place / "model.safetensors").write_bytes(os.urandom(4096))
    else:
        subprocess.run([sys.executable, "-c", _WEIGHTS, str(place)], check=True, stdout=subprocess.DEVNULL)
    return place


def compare(plain: CheckedEngine, cached: CheckedEngine, seed: int, prompts: int, longest: int) -> None:
    """Compare outputs and KV bytes without kvtier, with it cold, and with it warm.

    What vLLM's own prefix cache holds, kvtier loads: both compute the same rest in the same shapes, and
    round alike. Computing all of the prompt has other shapes: vLLM's own cache may differ from that.
    """
    rng = random.Random(f"compared {seed}")
    equal: Counter[str] = Counter()
    for n in range(prompts):
        tokens = new_prompt(rng, longest - n * (longest - 300) // prompts)
        blocks = (len(tokens) - 1) // BLOCK
        outputs, sums = {}, {}
        for engine in (plain, cached):
            engine.ask("forget")
            outputs[engine, "cold"] = engine.ask("scored", tokens=tokens, max_tokens=_OUTPUT)
            sums[engine, "cold"] = engine.ask("sums", blocks=blocks)
            if engine is cached:
                # What was finished last is saved with the next step.
                cached.generate([new_prompt(rng, 8)], 1)
                wait_for(cached, "saved")
                cached.ask("forget")
                cached.ask("scramble")
            before = loaded(cached)
            outputs[engine, "warm"] = engine.ask("scored", tokens=tokens, max_tokens=_OUTPUT)
            sums[engine, "warm"] = engine.ask("sums", blocks=blocks)
        equal["loaded in whole"] += loaded(cached) - before == blocks * BLOCK
        for name, seen, (one, other) in (
            ("bytes, loaded = saved", sums, ((cached, "warm"), (cached, "cold"))),
            ("bytes, kvtier's engine = vLLM's", sums, ((cached, "cold"), (plain, "cold"))),
            ("outputs, cold = vLLM's", outputs, ((cached, "cold"), (plain, "cold"))),
            ("outputs, warm = vLLM's own prefix cache's", outputs, ((cached, "warm"), (plain, "warm"))),
            ("outputs, warm = computed", outputs, ((cached, "warm"), (cached, "cold"))),
            ("outputs, vLLM's own prefix cache's = computed", outputs, ((plain, "warm"), (plain, "cold"))),
        ):
            equal[name] += seen[one] == seen[other]
            if seen[one] != seen[other]:
                differing = [
                    n for n, pair in enumerate(zip(seen[one], seen[other], strict=True)) if pair[0] != pair[1]
                ]
                print(
                    f"{len(tokens)} tokens: {name}: not at {len(differing)} places from {differing[0]} on",
                    flush=True,
                )
    print(f"Of {prompts} prompts, {_OUTPUT} tokens each with log probabilities:", flush=True)
    for name, count in equal.items():
        print(f"  {name}: {count}", flush=True)


def loaded(engine: EngineProcess) -> int:
    """Return how many tokens an engine has loaded so far."""
    return int(engine.ask("counts").get("loaded_tokens", 0))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, help="vLLM, packed; without it the installed one is used")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--weights", action="store_true", help="random weights")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2000, 8000])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="9GiB")
    parser.add_argument("--format", choices=["raw", "planes"], default="raw", help="of the agent's memory")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compared", type=int, default=0, help="prompts whose outputs and KV are compared")
    arguments = parser.parse_args()
    begun = time.monotonic()
    os.environ.update(unpack(arguments.bundle) if arguments.bundle else {})
    with tempfile.TemporaryDirectory(prefix="kvtier-bench-") as folder, FastServer() as bucket:
        place = Path(folder)
        model = make_model(place / "model", arguments.shape, arguments.weights)
        node = Node(place, arguments.memory, bucket, form=arguments.format)
        config = node.start("disk", "s3")
        options = {
            "model": str(model),
            "load_format": "auto" if arguments.weights else "dummy",
            "dtype": "bfloat16",
            "block_size": BLOCK,
            # The engines start at the same time: neither may measure how much memory the other has left.
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": _POOLS[arguments.shape],
            "max_model_len": max(arguments.tokens) + 512,
            "max_num_batched_tokens": max(arguments.tokens) + 512,
        }
        plain = CheckedEngine(None, place / "plain.log", **options)
        cached = CheckedEngine(config, place / "cached.log", node.environment, **options)
        try:
            for engine in (plain, cached):
                engine.tell("ready")
            for engine in (plain, cached):
                engine.answer(max(1.0, begun + _START_SECONDS - time.monotonic()))
            wait_for(cached, "attached")
            print(f"engines are up after {time.monotonic() - begun:.0f} s", flush=True)
            if arguments.compared:
                compare(plain, cached, arguments.seed, arguments.compared, max(arguments.tokens))
            run_table(node, plain, cached, arguments.tokens, arguments.rounds, arguments.seed).show(
                "no cache"
            )
            print("counts:", json.dumps(cached.ask("counts")), flush=True)
        finally:
            plain.kill()
            cached.kill()
            node.stop()


if __name__ == "__main__":
    main()
