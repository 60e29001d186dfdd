"""kvtier under a real vLLM engine: the same tokens as without, whatever is restarted or killed."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from tests.s3_support import eventually
from tests.vllm.engine import BLOCK, SEED, prompt

pytestmark = pytest.mark.timeout(900)

SHARED = prompt("shared", 10 * BLOCK)
PROMPTS = {
    "first": [prompt("first", 12 * BLOCK + 5)],
    # The last of its tokens has to be computed, so its last block cannot be loaded.
    "whole blocks": [prompt("whole", 8 * BLOCK)],
    "eight": [prompt(f"eight {n}", len(SHARED) + 3 * BLOCK + 7 * n, SHARED) for n in range(8)],
    "killed": [prompt(f"killed {n}", 6 * BLOCK + n) for n in range(4)],
    "bucket": [prompt(f"bucket {n}", 6 * BLOCK + n) for n in range(4)],
    "after": [prompt("after", 5 * BLOCK)],
}


def warm_tokens(tokens: list[int]) -> int:
    """Return how many tokens of a prompt can be loaded."""
    return (len(tokens) - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def expected(plain) -> dict[str, list[list[int]]]:
    print("seed", SEED)
    return {name: plain.generate(prompts) for name, prompts in PROMPTS.items()}


def served(engine, before: dict) -> int:
    """Return the tokens loaded since `before`; vLLM and kvtier agree about them."""
    counts = engine.ask("counts")
    assert counts["vllm_external_hits"] == counts.get("loaded_tokens", 0)
    assert counts["worker"].get("load_failed_blocks", 0) == 0
    return counts.get("loaded_tokens", 0) - before.get("loaded_tokens", 0)


def warm(engine, name: str, expected: dict) -> None:
    """Run prompts until all that can be loaded is; a busy agent may miss its deadline, which is a miss."""

    def whole() -> bool:
        before = engine.ask("counts")
        engine.ask("forget")
        assert engine.generate(PROMPTS[name]) == expected[name]
        return served(engine, before) == sum(map(warm_tokens, PROMPTS[name]))

    eventually(whole, 180)
    engine.ask("forget")


def saved(engine) -> None:
    """Wait until all that was saved is written to the disk and the bucket."""

    def written() -> bool:
        store = engine.ask("counts")["store"]
        pending = [
            store.get(name, 0)
            for name in ("encoding_blocks", "queued_bytes", "filling_slots", "s3_pending_bytes")
        ]
        return not any(pending)

    eventually(written, 180)


@pytest.fixture(scope="module")
def home(node, bucket):
    return node("home", bucket)


def test_cold_then_warm_from_memory(home, expected):
    home.first_agent = home.agent()
    engine = home.first = home.engine()
    assert engine.ask("ready")
    eventually(lambda: engine.ask("attached"), 120)
    for name in ("first", "whole blocks"):
        before = engine.ask("counts")
        assert engine.generate(PROMPTS[name]) == expected[name], "cold"
        assert served(engine, before) == 0
        warm(engine, name, expected)
    metrics = engine.ask("counts")["in_vllm_metrics"]
    assert metrics["vllm:kvtier_loaded_tokens"] == engine.ask("counts")["loaded_tokens"]


def test_eight_at_once_with_a_shared_prefix(home, expected):
    engine = home.first
    assert engine.generate(PROMPTS["eight"]) == expected["eight"], "cold"

    def shared() -> bool:
        engine.ask("forget")
        before = engine.ask("counts")
        assert engine.generate(PROMPTS["eight"]) == expected["eight"], "warm"
        tokens = served(engine, before)
        assert tokens <= sum(map(warm_tokens, PROMPTS["eight"]))
        # Those that come in one pass share what the first of them loads.
        return len(SHARED) <= tokens

    # A busy agent may miss its deadline, which is a miss.
    eventually(shared, 180)
    engine.ask("forget")


def test_the_agent_is_killed_in_the_middle(home, expected):
    engine = home.first
    engine.generate(PROMPTS["killed"][:2])
    engine.ask("forget")
    saved(engine)
    engine.tell("generate", prompts=PROMPTS["killed"], max_tokens=6)
    time.sleep(0.2)
    home.first_agent.kill()
    assert engine.answer() == expected["killed"]
    assert engine.generate(PROMPTS["after"]) == expected["after"], "without an agent"
    engine.ask("forget")
    home.first_agent = home.agent()
    eventually(lambda: engine.ask("attached"), 120)
    warm(engine, "first", expected)


def test_a_new_agent_and_a_new_engine_load_from_the_disk(home, expected):
    saved(home.first)
    home.first.end()
    home.first_agent.end()
    home.first_agent = home.agent()
    engine = home.first = home.engine()
    assert engine.ask("ready")
    eventually(lambda: engine.ask("attached"), 120)
    warm(engine, "first", expected)
    assert engine.ask("counts")["store"]["disk_staged_blocks"] > 0


def test_an_empty_node_loads_from_the_bucket_and_two_engines_share_it(home, node, bucket, expected):
    away = home.away = node("away", bucket)
    away.agent()
    engine = away.first = away.engine()
    assert engine.ask("ready")
    eventually(lambda: engine.ask("attached"), 120)
    eventually(lambda: engine.ask("counts")["store"].get("s3_blocks_known"), 120)
    warm(engine, "whole blocks", expected)
    assert engine.ask("counts")["store"]["s3_staged_blocks"] > 0
    # What this one computes, the other loads.
    assert engine.generate(PROMPTS["after"]) == expected["after"]
    saved(engine)
    known = engine.ask("counts")["store"]["s3_blocks_known"]
    eventually(lambda: home.first.ask("counts")["store"]["s3_blocks_known"] >= known, 180)
    warm(home.first, "after", expected)
    assert home.first.ask("counts")["store"]["s3_staged_blocks"] > 0


def test_the_bucket_is_killed_in_the_middle(home, bucket, expected):
    engine = home.away.first
    engine.ask("forget")
    engine.tell("generate", prompts=[*PROMPTS["killed"], *PROMPTS["bucket"]], max_tokens=6)
    time.sleep(0.2)
    bucket.kill()
    assert engine.answer() == [*expected["killed"], *expected["bucket"]]
    warm(engine, "bucket", expected)
    bucket.restart()
