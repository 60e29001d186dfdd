"""What the vLLM benchmarks share: an agent whose tiers can be changed, engines, and the rows of a table."""

from __future__ import annotations

import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from s3_server import FastServer

from tests.vllm.engine import EngineProcess

BLOCK = 32
_WARM_UPS = 3
KEYS = {"KVTIER_BENCH_ACCESS_KEY": "kvtier", "KVTIER_BENCH_SECRET_KEY": "kvtier"}


class Node:
    """A kvtier agent: memory, and disk and a bucket, which can be left out at a restart."""

    def __init__(
        self, place: Path, memory: str, bucket: FastServer, wait: str = "10s", form: str = "raw"
    ) -> None:
        self.place = place
        self.environment = {**os.environ, **KEYS, "XDG_RUNTIME_DIR": str(place)}
        self._memory = f"memory: {{size: {memory}, format: {form}}}\n"
        self._common = f"agent: {{mode: external, directory: {place}/agent}}\nlookup_wait: {wait}\n"
        access, secret = KEYS
        self._tiers = {
            "disk": f"disk: {{path: {place}/disk, size: 20GiB}}\n",
            "s3": f"s3: {{bucket: bench, endpoint: '{bucket.endpoint}', region: us-east-1,"
            f" index_refresh: 200ms, access_key_env: {access}, secret_key_env: {secret}}}\n",
        }
        self._agent: subprocess.Popen[bytes] | None = None

    def start(self, *tiers: str) -> Path:
        """End the agent and run one with an empty memory over these tiers; returns its settings."""
        self.stop()
        config = self.place / "kvtier.yaml"
        config.write_text(self._memory + self._common + "".join(self._tiers[tier] for tier in tiers))
        command = [
            sys.executable,
            "-c",
            "from kvtier.cli import main; main()",
            "agent",
            "--config",
            str(config),
        ]
        with (self.place / "agent.log").open("ab") as log:
            self._agent = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        return config

    def stop(self) -> None:
        """End the agent, which writes what is pending."""
        if self._agent is not None:
            self._agent.send_signal(signal.SIGTERM)
            self._agent.wait(300)
            self._agent = None


def wait_for(engine: EngineProcess, what: str) -> None:
    """Wait until the engine has its agent ("attached"), or all that it saved is written ("written")."""
    deadline = time.monotonic() + 300
    while not _reached(engine, what):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {what}: {engine.ask('counts')}")
        time.sleep(0.05)


def _reached(engine: EngineProcess, what: str) -> bool:
    if what == "attached":
        return bool(engine.ask("attached"))
    store = engine.ask("counts")["store"]
    names = ["filling_slots"]
    if what == "written":
        names += ["encoding_blocks", "queued_bytes", "s3_pending_bytes"]
    return not any(store.get(name, 0) for name in names)


class Table:
    """Seconds to the first token by row and prompt length, and how many tokens were loaded."""

    def __init__(self) -> None:
        self.times: dict[str, dict[int, list[float]]] = {}
        self.loaded: dict[str, dict[int, list[int]]] = {}

    def measure(self, row: str, engine: EngineProcess, tokens: list[int], connector: bool = True) -> None:
        """Run one prompt and note it; prompts of no interest before it, since a GPU that idled is slow."""
        for _ in range(_WARM_UPS):
            engine.ask("timed", tokens=new_prompt(random.Random(time.monotonic_ns()), BLOCK - 1))
        before = engine.ask("counts").get("loaded_tokens", 0) if connector else 0
        seconds = engine.ask("timed", tokens=tokens)
        after = engine.ask("counts").get("loaded_tokens", 0) if connector else 0
        self.times.setdefault(row, {}).setdefault(len(tokens), []).append(seconds)
        self.loaded.setdefault(row, {}).setdefault(len(tokens), []).append(after - before)
        engine.ask("forget")

    def show(self, base: str) -> None:
        """Print the medians as a table, each with its median ratio to the same round of `base`."""
        lengths = sorted(self.times[base])
        print("| | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |")
        print("|---" * (len(lengths) + 1) + "|")
        for row, by_length in self.times.items():
            cells = []
            for length in lengths:
                times = by_length.get(length)
                if not times:
                    cells.append("–")
                    continue
                ratios = [t / b for t, b in zip(times, self.times[base][length], strict=False)]
                loaded = statistics.median(self.loaded[row][length])
                cell = f"{statistics.median(times) * 1000:,.0f} ms"
                cell += "" if row == base else f" ({statistics.median(ratios):.2f} ×)"
                cells.append(cell + (f", {loaded:,.0f} loaded" if loaded else ""))
            print(f"| {row} | " + " | ".join(cells) + " |")


def new_prompt(rng: random.Random, tokens: int) -> list[int]:
    """Return a prompt that nobody has seen."""
    return [rng.randrange(1000, 30_000) for _ in range(tokens)]


def run_table(
    node: Node,
    plain: EngineProcess,
    cached: EngineProcess,
    lengths: list[int],
    rounds: int,
    seed: int,
) -> Table:
    """Measure: no cache and a cold kvtier in turns, then warm from memory, from the disk, from the bucket.

    Args:
        node: The agent, running with all tiers.
        plain: An engine without kvtier.
        cached: One with it.
        lengths: Tokens of the prompts.
        rounds: Prompts of each length.
        seed: Of the prompts.
    """
    rng, table = random.Random(f"table {seed}"), Table()
    prompts = [[new_prompt(rng, length) for length in lengths] for _ in range(rounds)]
    for length in lengths:
        for engine in (plain, cached):
            for _ in range(2):
                engine.ask("timed", tokens=new_prompt(rng, length))
    wait_for(cached, "saved")
    for round_ in prompts:
        for tokens in round_:
            table.measure("no cache", plain, tokens, connector=False)
            plain.ask("timed", tokens=tokens)
            table.measure("vLLM's own prefix cache", plain, tokens, connector=False)
            table.measure("kvtier, cold", cached, tokens)
            wait_for(cached, "saved")
            table.measure("kvtier, from memory, while the agent writes", cached, tokens)
        # The agent's work on one prompt must not count for another.
        wait_for(cached, "written")
        for tokens in round_:
            table.measure("kvtier, from memory", cached, tokens)
    for row, tier in (("kvtier, from disk", "disk"), ("kvtier, from the bucket", "s3")):
        node.start(tier)
        wait_for(cached, "attached")
        time.sleep(2.0)
        for tokens in itertools.chain.from_iterable(prompts):
            table.measure(row, cached, tokens)
    return table
