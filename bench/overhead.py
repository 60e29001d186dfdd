"""What the connector costs in the engine's threads, on the reference engine with a model that takes its time.

    python bench/overhead.py [--batch 64] [--iterations 300] [--pass-ms 5] [--mode agent|inprocess]

A pass of the model takes a fixed time, in which its thread spins. Every call of the connector is timed on
its own; the copies of saved blocks are left out, which a GPU makes by itself, but not what it takes to order
them. The agent runs in a process of its own.

Medians tell something on a quiet machine alone; the fastest are what other processes disturb least.

- A decoding pass: by the clock on the wall. A block is completed every 32nd token of a request, so two in a
  pass of 64 requests, on average.
- A saved block: the thread's CPU time that it adds to the passes in which a slot is asked for, waited for and
  filled, which are different ones with an agent. The arena is full: a new block takes an old one's slot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from kvtier.engine import Engine, EngineConfig, KVMemory, ModelSpec, Request, Span
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker

TOKENS_PER_BLOCK = 32
PROMPT = 100_000
DECODING = ("build_connector_meta", "bind_connector_meta", "start_load_kv", "wait_for_layer_load",
            "save_kv_layer", "wait_for_save", "get_finished")  # fmt: skip


class NoModel:
    """Gives a token after a fixed time, the same on every rank."""

    path = "no-model"

    def __init__(self) -> None:
        self.seconds = 0.0
        self.spec = ModelSpec(layers=8, kv_heads=4, head_dim=64, vocab_size=32000)

    def forward(  # noqa: D102
        self, spans: Sequence[Span], memory: KVMemory, before: Any, after: Any
    ) -> list[int | None]:
        for layer in range(self.spec.layers):
            before(layer)
            after(layer)
        end = time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            # Without the interpreter's lock, as a thread does that waits for a GPU.
            hashlib.pbkdf2_hmac("sha256", b"", b"", 100)
        return [span.end % 31000 if span.sample else None for span in spans]

    def shard(self, group: Any) -> NoModel:  # noqa: D102
        return self


clock = [time.perf_counter]
"""What calls are timed with."""


def timed(cls: type) -> type:
    """Return a subclass whose connector methods note how long they take, in seconds by name."""

    def wrap(name: str) -> Any:
        original = getattr(cls, name)

        def call(self: Any, *arguments: Any) -> Any:
            now = clock[0]
            start = now()
            try:
                return original(self, *arguments)
            finally:
                self.taken[name] += now() - start

        return call

    def init(self: Any, llm_args: Any) -> None:
        self.taken = Counter()
        cls.__init__(self, llm_args)  # type: ignore[misc]

    names = [*DECODING, "get_num_new_matched_tokens", "request_finished"]
    methods = {name: wrap(name) for name in names if hasattr(cls, name)}
    return type(f"Timed{cls.__name__}", (cls,), {"__init__": init, **methods})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--pass-ms", type=float, default=5.0)
    parser.add_argument("--mode", choices=["agent", "inprocess"], default="agent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvo", dir="/tmp") as directory:
        file = Path(directory) / "kvtier.yaml"
        mode = "external" if options.mode == "agent" else "inprocess"
        agent = {"mode": mode, "directory": directory}
        file.write_text(yaml.safe_dump({"memory": {"size": "128MiB"}, "agent": agent}))
        os.environ["KVTIER_CONFIG"] = str(file)
        server = None
        if options.mode == "agent":
            server = subprocess.Popen([sys.executable, "-c", _SERVE], stderr=subprocess.DEVNULL)
        try:
            passes = decode(options.batch, options.iterations, options.pass_ms / 1e3)
            results = {"steady decode, us": passes, "lookup, ms": lookup()}
        finally:
            if server is not None:
                server.terminate()
                server.wait(30)
    print(json.dumps({"mode": options.mode, "batch": options.batch, **results}, indent=2))


_SERVE = "from kvtier.config import load_config; from kvtier.agent.process import serve; serve(load_config())"


def open_engine(batch: int, blocks: int) -> Engine:
    """Start an engine and wait until it saves blocks."""
    config = EngineConfig(
        num_blocks=blocks, tokens_per_block=TOKENS_PER_BLOCK, max_batch_size=batch, poison=False
    )
    connector = {"leader_class": timed(KvTierConnectorLeader), "worker_class": timed(KvTierConnectorWorker)}
    engine = Engine(NoModel(), config, **connector)
    while not engine.connector.leader.stats().get("store_saved_blocks"):
        engine.submit(Request([random.randrange(32000) for _ in range(TOKENS_PER_BLOCK + 1)], 2))
        engine.settle()
        time.sleep(0.01)
    return engine


def decode(batch: int, iterations: int, seconds: float) -> dict[str, float]:
    """Return the connector's microseconds in passes that only decode, and what a saved block adds to them."""
    engine = open_engine(batch, 2 * batch * (iterations // TOKENS_PER_BLOCK + 6))
    engine.model.seconds = seconds
    # On a GPU the copy is enqueued, and does not hold up this thread.
    engine.connector.worker._transfers.mover._copy = lambda *ranges: None
    clock[0] = time.perf_counter
    passes = run_passes(engine, batch, iterations)
    leader, worker = ([one[half] for one in passes] for half in ("leader", "worker"))
    both = [sum(pair) for pair in zip(leader, worker, strict=True)]
    # A system call, which would count for too much in a whole pass; in differences it does not.
    clock[0] = time.thread_time
    passes = run_passes(engine, batch, iterations)
    results = {
        "rank 0, median": statistics.median(both),
        "rank 0, mean": statistics.mean(both),
        "rank 0, fastest tenth": statistics.quantiles(both, n=10)[0],
        "other ranks, median": statistics.median(worker),
        "blocks saved in a pass": statistics.mean(one["saved"] for one in passes),
        "a saved block, leader": cost_of_a_block(passes, "leader"),
        "a saved block, worker": cost_of_a_block(passes, "worker"),
    }
    return {name: round(value, 1) for name, value in results.items()}


def cost_of_a_block(passes: Sequence[dict[str, float]], half: str) -> float:
    """Return what a block adds to the passes in which a slot is asked for, waited for and filled.

    A least-squares fit to these three and a constant, without the passes that take much longer than it says:
    those in which something else happened to the thread.
    """
    causes = ("asked", "waiting", "saved")
    facts = np.array([[1.0, *(one[cause] for cause in causes)] for one in passes])
    times = np.array([one[half] for one in passes])
    for _ in range(5):
        fit = np.linalg.lstsq(facts, times, rcond=None)[0]
        beyond = times - facts @ fit
        kept = beyond <= np.quantile(beyond, 0.95)
        facts, times = facts[kept], times[kept]
    blocks = sum(one["saved"] for one in passes)
    shares = [sum(one[cause] for one in passes) / blocks for cause in causes]
    return float(fit[1:] @ shares)


def run_passes(engine: Engine, batch: int, iterations: int) -> list[dict[str, float]]:
    """Decode, with requests of random lengths.

    Returns:
        For each pass the microseconds of both halves of the connector, the blocks that a slot was asked for
        in it, those that still waited for theirs, and those that were saved.
    """
    leader, worker = engine.connector.leader, engine.connector.worker
    rng = random.Random(str(clock))
    for _ in range(batch):
        length = rng.randrange(2 * TOKENS_PER_BLOCK, 3 * TOKENS_PER_BLOCK)
        engine.submit(Request([rng.randrange(32000) for _ in range(length)], iterations + 60))
    for _ in range(40):
        engine.step()
    passes = []
    for _ in range(iterations):
        saved, waiting = worker.stats().get("saved_blocks", 0), len(leader._offers)
        for half in (leader, worker):
            half.taken.clear()
        engine.step()
        times = {name: sum(half.taken.values()) * 1e6 for name, half in
                 (("leader", leader), ("worker", worker))}  # fmt: skip
        saved = worker.stats().get("saved_blocks", 0) - saved
        asked = len(leader._offers) - waiting + saved
        passes.append({**times, "asked": asked, "waiting": waiting, "saved": saved})
    engine.settle()
    return passes


def lookup(rounds: int = 15) -> dict[str, float]:
    """Return the time of lookups of a long prompt of which nothing is cached, new and just looked up."""
    engine = open_engine(1, 64)
    leader = engine.connector.leader
    rng = random.Random(2)
    times: dict[str, list[float]] = {"new": [], "same": [], "next turn": []}
    for number in range(rounds):
        tokens = [rng.randrange(32000) for _ in range(PROMPT)]
        turns = {"new": tokens, "same": tokens, "next turn": [*tokens, *tokens[:500]]}
        for kind, prompt in turns.items():
            request = SimpleNamespace(
                request_id=f"{number} {kind}", prompt_len=len(prompt), get_tokens=lambda _, p=prompt: list(p)
            )
            start = time.perf_counter()
            leader.get_num_new_matched_tokens(request, 0)
            times[kind].append((time.perf_counter() - start) * 1e3)
    return {kind: round(statistics.median(values), 2) for kind, values in times.items()}


if __name__ == "__main__":
    main()
