"""What a store client's calls cost with the agent, against the same calls of a store in this process.

    python bench/agent.py [--blocks 1000] [--rounds 300]

Calls of the two alternate in one run, with an agent in a process of its own; medians and their ratio.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from kvtier.agent.client import Deadlines, connect
from kvtier.agent.process import serve
from kvtier.config import AgentConfig, Config, MemoryConfig
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import StoreClient, TieredStore
from kvtier.tiers.memory import MemoryTier

LAYOUT = BlockLayout("uint8", 32, layers=1, kv_factor=1, row_elements=64)
NAMESPACE = Namespace.from_facts({"bench": "agent", **LAYOUT.describe()})
ROOT = chain_root(NAMESPACE.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="kvb", dir="/tmp"))
    size = max(1 << 20, 4 * options.blocks * 4096)
    config = Config(memory=MemoryConfig(size=size), agent=AgentConfig(mode="external", directory=directory))
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(config,), daemon=True)
    process.start()
    agent = connect(config, NAMESPACE, LAYOUT, deadlines=Deadlines(5.0, 5.0))
    local = TieredStore(NAMESPACE, LAYOUT, MemoryTier(size, LAYOUT.block_bytes))
    try:
        results = measure({"in process": local, "agent": agent}, options.blocks, options.rounds)
    finally:
        agent.close()
        local.close()
        process.terminate()
        process.join(20)
        shutil.rmtree(directory)
    print(json.dumps({"blocks": options.blocks, "rounds": options.rounds, "microseconds": results}, indent=2))


def measure(clients: dict[str, StoreClient], blocks: int, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median microseconds of each call for each client, and the ratio."""
    rng = random.Random(1)
    prompt = [rng.randrange(1 << 17) for _ in range(blocks * 32)]
    hashes = hash_blocks(ROOT, prompt, 32)
    absent = hash_blocks(ROOT, list(reversed(prompt)), 32)
    for client in clients.values():
        save(client, hashes)
    fresh = {name: itertools.count() for name in clients}

    def new_block(name: str) -> bytes:
        return next(fresh[name]).to_bytes(16, "big")

    def save_one(name: str, client: StoreClient) -> None:
        save(client, [new_block(name)])

    # Committed twice they change nothing, and are sent all the same.
    stale = {name: client.reserve(ROOT, 0, [new_block(name)]) for name, client in clients.items()}

    def commit_again(name: str, client: StoreClient) -> None:
        client.commit([ticket for ticket in stale[name] if ticket is not None])

    calls: dict[str, Callable[[str, StoreClient], object]] = {
        f"match and release {blocks} resident blocks": lambda _, client: client.release(
            client.match(hashes, wait=0.05).lease
        ),
        "match and release 32 resident blocks": lambda _, client: client.release(
            client.match(hashes[:32], wait=0.05).lease
        ),
        f"match {blocks} absent blocks": lambda _, client: client.match(absent, wait=0.05),
        "reserve and commit one block": save_one,
        "commit, as far as it holds up the caller": commit_again,
    }
    return {what: paired(call, clients, rounds) for what, call in calls.items()}


def paired(
    call: Callable[[str, StoreClient], object], clients: dict[str, StoreClient], rounds: int
) -> dict[str, float]:
    """Time a call of each client in turns."""
    times: dict[str, list[float]] = {name: [] for name in clients}
    for _ in range(rounds):
        for name, client in clients.items():
            start = time.perf_counter()
            call(name, client)
            times[name].append((time.perf_counter() - start) * 1e6)
    medians = {name: round(statistics.median(values), 1) for name, values in times.items()}
    local, agent = medians.values()
    return {**medians, "ratio": round(agent / local, 2)}


def save(client: StoreClient, hashes: list[bytes]) -> None:
    """Reserve and commit blocks without writing their bytes."""
    client.commit([ticket for ticket in client.reserve(ROOT, 0, hashes) if ticket is not None])


if __name__ == "__main__":
    main()
