"""What the connector costs in the engine's threads, on the reference engine with a model that takes no time.

    python bench/overhead.py [--batch 64] [--iterations 300] [--mode agent|inprocess]

Every call of the connector is timed on its own; the model computes nothing, and the copies of saved blocks
are left out, which a GPU makes by itself. The agent runs in a process of its own. Medians, and for decoding
the mean too: a block is completed every 32nd token of a request.
"""

from __future__ import annotations

import argparse
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

import yaml

from kvtier.engine import Engine, EngineConfig, KVMemory, ModelSpec, Request, Span
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker

TOKENS_PER_BLOCK = 32
PROMPT = 100_000
DECODING = ("build_connector_meta", "bind_connector_meta", "start_load_kv", "wait_for_layer_load",
            "save_kv_layer", "wait_for_save", "get_finished")  # fmt: skip


class NoModel:
    """Gives a token at once, the same on every rank."""

    path = "no-model"

    def __init__(self) -> None:
        self.spec = ModelSpec(layers=8, kv_heads=4, head_dim=64, vocab_size=32000)

    def forward(  # noqa: D102
        self, spans: Sequence[Span], memory: KVMemory, before: Any, after: Any
    ) -> list[int | None]:
        for layer in range(self.spec.layers):
            before(layer)
            after(layer)
        return [span.end % 31000 if span.sample else None for span in spans]

    def shard(self, group: Any) -> NoModel:  # noqa: D102
        return self


def timed(cls: type) -> type:
    """Return a subclass whose connector methods note how long they take, in seconds by name."""

    def wrap(name: str) -> Any:
        original = getattr(cls, name)

        def call(self: Any, *arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(self, *arguments)
            finally:
                self.taken[name] += time.perf_counter() - start

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
    parser.add_argument("--mode", choices=["agent", "inprocess"], default="agent")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvo", dir="/tmp") as directory:
        file = Path(directory) / "kvtier.yaml"
        mode = "external" if options.mode == "agent" else "inprocess"
        agent = {"mode": mode, "directory": directory}
        file.write_text(yaml.safe_dump({"memory": {"size": "2GiB"}, "agent": agent}))
        os.environ["KVTIER_CONFIG"] = str(file)
        server = None
        if options.mode == "agent":
            server = subprocess.Popen([sys.executable, "-c", _SERVE], stderr=subprocess.DEVNULL)
        try:
            results = {"steady decode, us": decode(options.batch, options.iterations), "lookup, ms": lookup()}
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


def decode(batch: int, iterations: int) -> dict[str, float]:
    """Return the connector's time in iterations that only decode, and what a saved block adds to it."""
    engine = open_engine(batch, 2 * batch * (iterations // TOKENS_PER_BLOCK + 6))
    rng = random.Random(1)
    for _ in range(batch):
        length = rng.randrange(32, 96)
        engine.submit(Request([rng.randrange(32000) for _ in range(length)], iterations + 60))
    for _ in range(40):
        engine.step()
    leader, worker = engine.connector.leader, engine.connector.worker
    # On a GPU the copy is enqueued, and does not hold up this thread.
    worker._transfers.mover.save = lambda blocks, stream: None
    taken: dict[str, list[float]] = {"leader": [], "worker": []}
    saved = []
    for _ in range(iterations):
        before = worker.stats().get("saved_blocks", 0)
        for half in (leader, worker):
            half.taken.clear()
        engine.step()
        taken["leader"].append(sum(leader.taken.values()) * 1e6)
        taken["worker"].append(sum(worker.taken.values()) * 1e6)
        saved.append(worker.stats().get("saved_blocks", 0) - before)
    both = [sum(pair) for pair in zip(*taken.values(), strict=True)]
    idle = [spent for spent, blocks in zip(both, saved, strict=True) if not blocks]
    results = {
        "rank 0, median": statistics.median(both),
        "rank 0, mean": statistics.mean(both),
        "rank 0, without a block to save, median": statistics.median(idle) if idle else float("nan"),
        "other ranks, median": statistics.median(taken["worker"]),
        "blocks saved in an iteration": statistics.mean(saved),
    }
    for half, times in taken.items():
        plain = statistics.median([t for t, blocks in zip(times, saved, strict=True) if not blocks])
        extra = [(t - plain) / blocks for t, blocks in zip(times, saved, strict=True) if blocks]
        results[f"a saved block, {half}, median"] = statistics.median(extra)
    return {name: round(value, 1) for name, value in results.items()}


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
