"""`kvtier bench lookup`: what a lookup costs the engine's thread."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore
from kvtier.tiers.memory import MemoryTier

ROUNDS = 15


def run(tokens: int, tokens_per_block: int, json_out: bool) -> None:
    """Measure and print medians of `ROUNDS` runs in milliseconds.

    Args:
        tokens: Length of the random prompt.
        tokens_per_block: Tokens in a block.
        json_out: Print JSON instead of a table.
    """
    layout = BlockLayout("uint8", tokens_per_block, layers=1, kv_factor=1, row_elements=64)
    namespace = Namespace.from_facts({"bench": "lookup", **layout.describe()})
    root = chain_root(namespace.id)
    prompt = [random.randrange(1 << 17) for _ in range(tokens)]  # noqa: S311 - not for secrets
    hashes = hash_blocks(root, prompt, tokens_per_block)
    memory = MemoryTier((len(hashes) + 1) * 4096, layout.block_bytes)
    store = TieredStore(namespace, layout, memory)
    missing = _median_ms(lambda: store.release(store.match(hashes).lease))
    store.commit([ticket for ticket in store.reserve(root, 0, hashes) if ticket is not None])
    result = {
        "tokens": tokens,
        "tokens_per_block": tokens_per_block,
        "blocks": len(hashes),
        "hash_ms": _median_ms(lambda: hash_blocks(root, prompt, tokens_per_block)),
        "match_miss_ms": missing,
        "match_hit_ms": _median_ms(lambda: store.release(store.match(hashes).lease)),
    }
    store.close()
    if json_out:
        print(json.dumps(result))
        return
    table = Table("what", "ms, median", title=f"{tokens} tokens in {len(hashes)} blocks, one thread")
    table.add_row("hash the prompt", f"{result['hash_ms']:.2f}")
    table.add_row("look it up, nothing held", f"{result['match_miss_ms']:.2f}")
    table.add_row("look it up, all resident, lease and release", f"{result['match_hit_ms']:.2f}")
    Console().print(table)


def _median_ms(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return round(statistics.median(times), 3)
