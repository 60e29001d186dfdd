"""The connector over the agent, with one, two and four ranks: same tokens cold, warm and restarted.

The hash model's next token depends on every byte of KV that any rank reads.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import yaml

from kvtier.agent.client import Deadlines
from kvtier.connector import shared
from kvtier.engine import Engine, EngineConfig, HashModel, Request
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.agent_support import AgentProcess, Place, eventually
from tests.e2e.test_connector_schedules import TOKENS_PER_BLOCK, random_requests

# Threads that OpenMP keeps spinning would take the cores from the agent and the other ranks.
torch.set_num_threads(1)

CONNECTOR = {"leader_class": KvTierConnectorLeader, "worker_class": KvTierConnectorWorker}
MEMORY = 4 << 20


@pytest.fixture
def place(monkeypatch, tmp_path):
    place = Place(MEMORY)
    file = tmp_path / "kvtier.yaml"
    settings = {
        "memory": {"size": MEMORY},
        "agent": {"mode": "external", "directory": str(place.directory)},
        "lookup_wait": "2s",
    }
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    monkeypatch.setattr(shared, "DEADLINES", Deadlines(20.0, 20.0))
    yield place
    place.remove()


@contextmanager
def started(ranks: int, connected: bool = True, **changes: object) -> Iterator[Engine]:
    """Yield an engine; with a connector, once all of its ranks are attached to the agent."""
    settings = {"num_blocks": 64, "tokens_per_block": TOKENS_PER_BLOCK, "version": "1.3", **changes}
    config = EngineConfig(tensor_parallel_size=ranks, **settings)
    engine = Engine(HashModel(layers=3, kv_heads=4, head_dim=64), config, **(CONNECTOR if connected else {}))
    try:
        if connected:
            warm_up(engine)
        yield engine
    finally:
        engine.close()
        if engine.connector is not None:
            engine.connector.worker.close()
            engine.connector.leader.close()


def warm_up(engine: Engine) -> None:
    """Send requests until one is saved: the other ranks attach when they have heard from the leader."""

    # The other ranks' commits arrive a little later than their copies end.
    before = engine.connector.leader.stats().get("store_saved_blocks", 0)

    def saves() -> bool:
        prompt = [random.randrange(1000) for _ in range(engine.config.tokens_per_block + 1)]
        engine.submit(Request(prompt, 1))
        engine.settle()
        return engine.connector.leader.stats().get("store_saved_blocks", 0) > before

    eventually(saves, "blocks are saved")


def outputs(engine: Engine, requests: list[Request]) -> list[list[int]]:
    ids = [engine.submit(request) for request in requests]
    engine.settle()
    return [engine.output(request_id) for request_id in ids]


def external(engine: Engine) -> int:
    return sum(sequence.metrics.tokens_external for sequence in engine._sequences.values())


def check_clean(engine: Engine) -> None:
    """See that nothing is left over and nothing went wrong, on any rank."""
    engine.idle(2)

    def clean() -> bool:
        stats = engine.connector.leader.stats()
        return stats.get("store_leases") == 0 and stats.get("store_filling_slots") == 0

    eventually(clean, "no lease and no reservation is left")
    for stats in (engine.connector.leader.stats(), *engine.ranks.stats()):
        wrong = ("errors_", "orders_given_up", "save_failed", "tails_not_told")
        assert {name: value for name, value in stats.items() if name.startswith(wrong)} == {}


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.parametrize("ways", [
    {"version": "1.2"},
    {"version": "1.3", "overlap": True, "max_tokens_per_step": 32},
    {"version": "main", "layout": "groups", "window": 20, "overlap": True},
], ids=["1.2", "1.3", "main-groups"])  # fmt: skip
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cold_warm_and_restarted_engines_answer_alike(place, ranks, ways, seed):
    requests = random_requests(random.Random(f"{ranks} {ways} {seed}"), 6)
    with started(ranks, connected=False, **ways) as plain:
        expected = outputs(plain, requests)
    with AgentProcess(place):
        for turn in range(3):
            with started(ranks, **ways) as engine:
                assert outputs(engine, requests) == expected
                if turn:
                    assert external(engine) > 0
                check_clean(engine)
                assert engine.connector.max_metadata_bytes < 2048


def test_another_number_of_ranks_is_a_miss(place):
    requests = [Request([7 * i % 1000 for i in range(100)], 5)]
    with AgentProcess(place), started(1) as alone:
        outputs(alone, requests)
        for ranks, tokens in ((2, 0), (2, 96), (4, 0), (4, 96), (1, 96)):
            with started(ranks) as engine:
                outputs(engine, requests)
                assert external(engine) == tokens, ranks


def test_the_answer_is_saved_to_its_last_block(place):
    """The tail travels through the agent: an idle engine builds no metadata."""
    prompt = [3 * i % 1000 for i in range(40)]
    with AgentProcess(place):
        with started(2) as engine:
            (answer,) = outputs(engine, [Request(prompt, 60)])
            check_clean(engine)
        with started(2) as engine:
            request_id = engine.submit(Request([*prompt, *answer, 1, 2], 3))
            engine.settle()
            assert engine.metrics(request_id).tokens_external == 96


def test_without_an_agent_the_engine_starts_and_serves(place):
    requests = random_requests(random.Random(3), 4)
    with started(2, connected=False) as plain:
        expected = outputs(plain, requests)
    engine = Engine(
        HashModel(layers=3, kv_heads=4, head_dim=64),
        EngineConfig(num_blocks=64, tokens_per_block=TOKENS_PER_BLOCK, version="1.3", tensor_parallel_size=2),
        **CONNECTOR,
    )
    assert outputs(engine, requests) == expected
    with AgentProcess(place):
        warm_up(engine)
        assert outputs(engine, requests) == expected
        check_clean(engine)
    engine.close()
