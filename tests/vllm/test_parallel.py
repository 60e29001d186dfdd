"""An engine of two ranks: processes of their own, each with its part of every block."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from tests.s3_support import eventually
from tests.vllm.engine import EngineProcess, prompt
from tests.vllm.models import model
from tests.vllm.storm import StormProcess, storm
from tests.vllm.test_storms import SMALL, check, nothing_held, words

pytestmark = pytest.mark.timeout(900)


def test_two_ranks(node, place):
    home = node("two", None)
    home.agent()
    options = {"model": model(home.place), "tensor_parallel_size": 2, **SMALL}
    plain = EngineProcess(None, home.place / "plain.log", **options)
    engine = StormProcess(home.config, home.place / "engine.log", home.environment, **options)
    home.running += [plain, engine]
    eventually(lambda: engine.ask("attached"), 180)
    prompts = [prompt(f"two {n}", 4 * 32 + n) for n in range(4)]
    expected = plain.generate(prompts)
    assert engine.generate(prompts) == expected

    def loaded() -> bool:
        before = engine.ask("counts").get("loaded_tokens", 0)
        engine.ask("forget")
        assert engine.generate(prompts) == expected
        return engine.ask("counts").get("loaded_tokens", 0) >= before + 4 * 3 * 32

    eventually(loaded, 180)
    plan = storm("two", 24, 40)
    right = words(plain, plan)
    check(plan, engine.ask("storm", plan=plan, seed="two", forget=0.1), right)
    nothing_held(engine)
    again = [{**request, "life": None} for request in plan]
    engine.ask("forget")
    assert check(again, engine.ask("storm", plan=again, seed="two again"), right) == len(plan)
    metrics = engine.ask("counts")["in_vllm_metrics"]
    # Both ranks count the blocks that they load.
    assert metrics["vllm:kvtier_loaded_blocks"] * 32 == 2 * metrics["vllm:kvtier_loaded_tokens"]
    assert metrics.get("vllm:kvtier_load_failed_blocks", 0) == 0


def test_ranks_without_an_agent_are_refused(tmp_path):
    config = tmp_path / "kvtier.yaml"
    config.write_text("memory: {size: 64MiB}\nagent: {mode: inprocess}\n")
    options = {"model": model(tmp_path), "tensor_parallel_size": 2}
    engine = EngineProcess(config, tmp_path / "engine.log", **options)
    try:
        with pytest.raises(AssertionError, match="inprocess serves an engine of one rank, this one has 2"):
            engine.ask("ready")
    finally:
        engine.kill()


def test_pipelines_are_refused(tmp_path):
    config = tmp_path / "kvtier.yaml"
    config.write_text(f"memory: {{size: 64MiB}}\nagent: {{mode: external, directory: {tmp_path}/a}}\n")
    options = {"model": model(tmp_path), "pipeline_parallel_size": 2}
    engine = EngineProcess(config, tmp_path / "engine.log", **options)
    try:
        with pytest.raises(AssertionError, match="pipeline and context parallelism are not supported"):
            engine.ask("ready")
    finally:
        engine.kill()
