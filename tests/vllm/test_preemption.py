"""Requests that are paused for want of room, and cancelled ones: nothing wrong is stored or stays held."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from tests.s3_support import eventually
from tests.vllm.engine import BLOCK, EngineProcess, prompt

pytestmark = pytest.mark.timeout(900)

PROMPTS = [prompt(f"paused {n}", 4 * BLOCK + 3 * n) for n in range(8)]
NEW = 70


@pytest.fixture(scope="module")
def engine(place):
    config = place / "memory.yaml"
    config.write_text("memory: {size: 256MiB}\nagent: {mode: inprocess}\n")
    # 31 blocks for 8 requests that need 7 each.
    process = EngineProcess(config, place / "small.log", num_gpu_blocks_override=32, max_model_len=256)
    yield process
    process.kill()


def test_preempted_requests_have_the_same_tokens(engine, plain):
    expected = plain.generate(PROMPTS, NEW)
    assert engine.generate(PROMPTS, NEW) == expected
    counts = engine.ask("counts")
    assert counts["vllm_preemptions"] > 0
    engine.ask("forget")
    assert engine.generate(PROMPTS, NEW) == expected
    counts = engine.ask("counts")
    assert counts["loaded_tokens"] > 0
    assert counts["worker"].get("load_failed_blocks", 0) == 0
    # What was saved over the pauses is right, too: other engines continue the answers.
    continued = [[*tokens, *output, 7] for tokens, output in zip(PROMPTS, expected, strict=True)]
    engine.ask("forget")
    assert engine.generate(continued) == plain.generate(continued)


def test_cancelled_requests_leave_nothing(engine):
    engine.ask("cancel", prompts=[prompt(f"gone {n}", 5 * BLOCK) for n in range(6)], steps=3)
    engine.generate([prompt("next", BLOCK)])

    def clean() -> bool:
        store = engine.ask("counts")["store"]
        return store["leases"] == store["filling_slots"] == 0

    eventually(clean, 120)


def test_other_salts_share_nothing(engine):
    tokens = prompt("salted", 5 * BLOCK)
    first = engine.ask("generate", prompts=[tokens], max_tokens=4, salts=["a"])
    before = engine.ask("counts").get("loaded_tokens", 0)
    for salts in (["b"], None):
        engine.ask("forget")
        assert engine.ask("generate", prompts=[tokens], max_tokens=4, salts=salts) == first
    assert engine.ask("counts").get("loaded_tokens", 0) == before
    engine.ask("forget")
    assert engine.ask("generate", prompts=[tokens], max_tokens=4, salts=["a"]) == first
    assert engine.ask("counts")["loaded_tokens"] == before + 4 * BLOCK


def test_a_reset_of_the_connector_forgets_everything(engine):
    tokens = prompt("reset", 5 * BLOCK)
    first = engine.generate([tokens])
    before = engine.ask("counts")["loaded_tokens"]
    assert engine.ask("forget_all")
    assert engine.generate([tokens]) == first
    assert engine.ask("counts")["loaded_tokens"] == before


def test_blocks_that_are_lost_before_the_load_are_computed(engine):
    tokens = prompt("lost", 5 * BLOCK)
    first = engine.generate([tokens])
    engine.ask("forget")
    engine.ask("lose_next_load")
    assert engine.generate([tokens]) == first
    assert engine.ask("counts")["worker"]["load_failed_blocks"] > 0
    # What was computed over the missing blocks was not stored.
    engine.ask("forget")
    longer = [*tokens, *first[0], *prompt("tail", 2 * BLOCK)]
    again = engine.generate([longer])
    engine.ask("forget")
    assert engine.generate([longer]) == again


def test_nothing_is_stored_of_a_pass_that_failed(engine):
    assert engine.ask("fail_a_pass", tokens=prompt("fails", 5 * BLOCK)) == 0
