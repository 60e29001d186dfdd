"""Storms: many requests with common prefixes, cancelled and paused at random, while agent and bucket die.

Every request must say what vLLM alone says, a cancelled one as far as it came, and what is stored in the end
must be what is computed in quiet.
"""

from __future__ import annotations

import time

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from tests.s3_support import eventually
from tests.vllm.engine import SEED
from tests.vllm.storm import StormProcess, storm

pytestmark = pytest.mark.timeout(900)

# 23 blocks for up to 8 requests that need up to 13 each, and prompts in pieces that end inside of a block.
SMALL = {
    "num_gpu_blocks_override": 24,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 80,
    "enable_chunked_prefill": True,
}
NEW = 50


def check(plan, said, expected) -> int:
    """Compare what was said with vLLM's own; returns how many requests came to their end."""
    ended = 0
    for request, words, right in zip(plan, said, expected, strict=True):
        assert words == right[: len(words)]
        if request["life"] is None:
            assert len(words) == request["new"]
            ended += 1
    return ended


def texts(plan, expected) -> list[list[int]]:
    return [[*request["prompt"], *words] for request, words in zip(plan, expected, strict=True)]


def stored_right(engine, plan, expected) -> None:
    result = engine.ask("spread", texts=texts(plan, expected))
    assert result["blocks"] > len(plan)
    assert result["worst"] < 0.01, "blocks are not what is computed in quiet"


def nothing_held(engine) -> None:
    def clean() -> bool:
        store = engine.ask("counts")["store"]
        return store["leases"] == store["filling_slots"] == 0

    eventually(clean, 120)


def words(plain, plan) -> list[list[int]]:
    """Return what vLLM alone says to each request, one at a time and to its end."""
    print("seed", SEED)
    outputs = plain.generate([request["prompt"] for request in plan], NEW)
    return [right[: request["new"]] for request, right in zip(plan, outputs, strict=True)]


@pytest.fixture(params=["", "drafts"])
def alone(request, place):
    """An engine with a store of its own, with and without drafts from the prompt."""
    config = place / f"storm {request.param}.yaml"
    config.write_text("memory: {size: 1GiB}\nagent: {mode: inprocess}\n")
    options = dict(SMALL)
    if request.param:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    process = StormProcess(config, place / f"storm {request.param}.log", **options)
    process.has_drafts = bool(request.param)
    yield process
    process.kill()


def test_cancelled_and_paused(alone, plain):
    plan = storm("alone", 36, NEW)
    expected = words(plain, plan)
    said = alone.ask("storm", plan=plan, seed="first", forget=0.05)
    assert 0 < check(plan, said, expected) < len(plan)
    nothing_held(alone)
    # What is stored now serves all of them again, whole.
    alone.ask("forget")
    again = [{**request, "life": None} for request in plan]
    assert check(again, alone.ask("storm", plan=again, seed="again"), expected) == len(plan)
    stored_right(alone, plan, expected)
    counts = alone.ask("counts")
    assert counts["vllm_preemptions"] > 0
    # vLLM counts what paused requests load by itself.
    assert counts["loaded_tokens"] >= counts["vllm_external_hits"] > 0
    assert counts["worker"].get("load_failed_blocks", 0) == 0
    assert (alone.ask("drafts") > 0) == alone.has_drafts
    nothing_held(alone)


def test_agent_and_bucket_die(node, bucket, plain, place):
    home = node("stormy", bucket, memory="1GiB")
    agent = home.agent()
    engine = StormProcess(home.config, home.place / "engine.log", home.environment, **SMALL)
    home.running.append(engine)
    eventually(lambda: engine.ask("attached"), 180)
    for turn, name in enumerate(("three", "four", "five")):
        plan = storm(name, 30, NEW)
        expected = words(plain, plan)
        engine.tell("storm", plan=plan, seed=name, forget=0.1)
        time.sleep(0.5 + turn)
        if turn != 1:
            agent.kill()
        if turn != 0:
            bucket.kill()
        time.sleep(1)
        if turn != 1:
            agent = home.agent()
        said = engine.answer()
        if turn != 0:
            bucket.restart()
        assert check(plan, said, expected) > 0
        eventually(lambda: engine.ask("attached"), 180)
        again = [{**request, "life": None} for request in plan]
        engine.ask("forget")
        assert check(again, engine.ask("storm", plan=again, seed=f"{name} again"), expected) == len(plan)
        nothing_held(engine)
    assert engine.ask("counts")["loaded_tokens"] > 0
    stored_right(engine, plan, expected)
