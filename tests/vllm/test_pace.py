"""The scheduler's half without an engine: how fast it takes the engine to compute."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from kvtier.vllm import scheduler as module
from kvtier.vllm.meta import WorkerMeta
from tests.vllm.test_worker import facts


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


@pytest.fixture
def half(monkeypatch):
    monkeypatch.setattr(module, "load_config", lambda path: SimpleNamespace(lookup_wait=1.0))
    monkeypatch.setattr(module, "config_path", lambda vllm_config: None)
    monkeypatch.setattr(module.EngineFacts, "read", lambda *arguments: facts())
    monkeypatch.setattr(module, "open_part", lambda *arguments: None)
    policy = SimpleNamespace(kv_load_failure_policy="recompute")
    return module.SchedulerHalf(SimpleNamespace(kv_transfer_config=policy), None)


def order(half, tokens: int) -> int:
    """Order a step over so many tokens and return its number."""
    nothing = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    output = SimpleNamespace(
        total_num_scheduled_tokens=tokens,
        num_scheduled_tokens={},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=nothing,
        scheduled_spec_decode_tokens={},
        preempted_req_ids=None,
    )
    return half.build_connector_meta(output).step


def end(half, step: int) -> None:
    half.update_connector_output(SimpleNamespace(kv_connector_worker_meta=WorkerMeta(step)))


def test_the_end_of_an_empty_step_is_not_that_of_the_next_one(half, clock):
    # With asynchronous scheduling the engine hears of a last, empty step when the next request has begun.
    empty = order(half, 0)
    clock.seconds = 10.0
    full = order(half, 8000)
    clock.seconds = 10.03
    end(half, empty)
    assert half._pace.block_cost(32) is None
    clock.seconds = 10.2
    end(half, full)
    assert half._pace.block_cost(32) == pytest.approx(0.2 / 250)


def test_steps_that_run_one_after_the_other_share_the_time(half, clock):
    steps = [order(half, 1000), order(half, 1000)]
    for step in steps:
        clock.seconds += 0.1
        end(half, step)
    assert half._pace.block_cost(10) == pytest.approx(0.001)


def test_ends_that_are_never_heard_of_are_forgotten(half, clock):
    steps = [order(half, 1000) for _ in range(50)]
    end(half, steps[-1])
    assert half._under_way == {}
