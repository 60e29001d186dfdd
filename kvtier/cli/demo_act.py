"""One engine process of the demo: order as JSON on standard input, result as JSON on standard output."""

from __future__ import annotations

import argparse
import email.message
import inspect
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from kvtier.agent.client import Deadlines
from kvtier.connector import shared
from kvtier.engine import Engine, EngineConfig, Request, Tokenizer, load_model, model_dir
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker

PATIENCE_SECONDS = 60.0


def main() -> None:
    """Run one prompt through a fresh engine and say what it took."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    # This engine computes on the cores that the agent needs; one with a GPU does not.
    shared.DEADLINES = Deadlines(10.0, 10.0)
    order = json.load(sys.stdin)
    model = load_model(model_dir())
    prompt = build_prompt(Tokenizer(model_dir()), order["tokens"], order["half"])
    blocks = 2 * (len(prompt) + order["new_tokens"]) // 32 + 8
    leader_class, worker_class = (
        (KvTierConnectorLeader, KvTierConnectorWorker) if order["cached"] else (None, None)
    )
    engine = Engine(
        model, EngineConfig(num_blocks=blocks), leader_class=leader_class, worker_class=worker_class
    )
    leader = engine.connector.leader if engine.connector else None
    # The first forward of a process pays for threads and caches; a server warms up before it serves.
    engine.submit(Request(list(range(1, 20)), max_new_tokens=2))
    engine.run()
    if leader is not None:
        wait_until(lambda: is_ready(stats(leader)))
    before = stats(leader)
    request = engine.submit(Request(prompt, max_new_tokens=order["new_tokens"]))
    engine.run(timeout=300)
    metrics, output = engine.metrics(request), engine.output(request)
    loaded = {
        tier: delta(before, stats(leader), f"store_hit_blocks_{tier}") * 32
        for tier in ("memory", "disk", "s3")
    }
    engine.settle()
    if leader is not None:
        wait_until(lambda: is_stored(stats(leader)))
    after = stats(leader)
    costs = ("encoded_raw_bytes", "encoded_bytes", "s3_get_requests", "s3_put_requests", "s3_list_requests")
    result = {
        "tokens_computed": metrics.tokens_computed,
        "tokens_loaded": {tier: tokens for tier, tokens in loaded.items() if tokens},
        "bytes_from_bucket": delta(before, after, "store_s3_get_bytes"),
        "ttft_s": metrics.ttft_s,
        # Since the agent's start: it may be older than this engine.
        "counters": {name: after.get(f"store_{name}", 0) for name in costs},
        "output": output,
    }
    engine.close()
    print(json.dumps(result))


def build_prompt(tokenizer: Tokenizer, length: int, half: bool) -> list[int]:
    """Return `length` tokens of Python's own source code; with `half` the second half is another text."""
    first = tokenizer.encode(inspect.getsource(argparse))[:length]
    if not half:
        return first
    other = tokenizer.encode(inspect.getsource(email.message) + inspect.getsource(statistics))
    shared = length // 2
    return first[:shared] + other[: length - shared]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, but not for ever: what is missing then shows in the result."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def is_ready(values: dict[str, Any]) -> bool:
    """Say whether the store has seen the bucket's index; a real engine's start takes longer than that."""
    return bool(values.get("store_s3_ready"))


def is_stored(values: dict[str, Any]) -> bool:
    """Say whether everything saved so far has reached disk and bucket."""
    waiting = ("filling_slots", "encoding_blocks", "queued_bytes", "s3_pending_bytes")
    return bool(values.get("store_client_connected")) and not any(
        values.get(f"store_{name}") for name in waiting
    )


def stats(leader: Any) -> dict[str, Any]:
    """Return the store's statistics, or nothing without a connector."""
    return dict(leader.stats()) if leader is not None else {}


def delta(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    """Return how much a counter grew."""
    return int(after.get(name, 0) - before.get(name, 0))


if __name__ == "__main__":
    main()
