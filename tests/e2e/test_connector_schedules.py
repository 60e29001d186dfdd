"""Random schedules on the reference engine: cold, warm on the same store, and warm after a restart.

The hash model's next token depends on every byte of KV that it reads, so equal outputs mean equal bytes.
"""

from __future__ import annotations

import gc
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvtier.engine import Engine, EngineConfig, HashModel, Multimodal, Request
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.trtllm_support import write_config

VOCABULARY = 1000
TOKENS_PER_BLOCK = 8


def patient_config(place: Path) -> Path:
    """Write a configuration with a disk; a busy machine's reads take longer than lookups wait by default."""
    file = write_config(place, disk=True)
    file.write_text(file.read_text() + "lookup_wait: 5s\n")
    return file


@dataclass
class Outcome:
    outputs: list[list[int]]
    external: int
    leftovers: dict[str, float]
    errors: dict[str, float]
    metadata_bytes: int


def random_requests(rng: random.Random, count: int) -> list[Request]:
    """Return prompts that share prefixes of a few documents, some with salts, LoRA ids and images."""
    documents = [[rng.randrange(VOCABULARY) for _ in range(100)] for _ in range(3)]
    requests = []
    for _ in range(count):
        prompt = rng.choice(documents)[: rng.randrange(1, 95)]
        prompt = prompt + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(12))]
        images = []
        if rng.random() < 0.2:
            start = rng.randrange(len(prompt))
            length = min(rng.randrange(1, 20), len(prompt) - start)
            images.append(Multimodal([rng.choice([1, -2]) for _ in range(8)], start, length))
        salt, lora = rng.choice([None, None, "tenant"]), rng.choice([None, None, 3])
        requests.append(Request(prompt, rng.randrange(1, 25), salt, lora, images))
    return requests


def run(
    config: EngineConfig, requests: list[Request], seed: int, connected: bool = True, cancelling: float = 0.0
) -> Outcome:
    """Run requests that arrive, and are cancelled, at random moments, on a new engine."""
    rng = random.Random(seed)
    connector = (
        {"leader_class": KvTierConnectorLeader, "worker_class": KvTierConnectorWorker} if connected else {}
    )
    engine = Engine(HashModel(layers=3, head_dim=64), config, **connector)
    ids = []
    for request in requests:
        ids.append(engine.submit(request))
        for _ in range(rng.randrange(3)):
            engine.step()
        if rng.random() < cancelling:
            engine.cancel(ids[rng.randrange(len(ids))])
    engine.settle()
    engine.idle(2)
    outputs = [engine.output(request_id) for request_id in ids]
    external = sum(engine.metrics(request_id).tokens_external for request_id in ids)
    if not connected:
        return Outcome(outputs, external, {}, {}, 0)
    stats = {**engine.connector.leader.stats(), **engine.connector.worker.stats()}
    names = ("store_leases", "store_filling_slots", "orders_given_up", "save_failed_blocks")
    leftovers = {name: stats[name] for name in names if stats.get(name)}
    errors = {name: value for name, value in stats.items() if name.startswith("errors_")}
    return Outcome(outputs, external, leftovers, errors, engine.connector.max_metadata_bytes)


def random_config(rng: random.Random, version: str, layout: str, overlap: bool) -> EngineConfig:
    grouped = {}
    if layout == "groups":
        grouped = {
            "num_groups": rng.choice([1, 2, 3]),
            "window": rng.choice([None, 10, 20, 50]),
            "honour_blocks": rng.choice([None, None, 0, 1, 2]),
            "tell_unused": rng.choice([False, True]),
        }
    return EngineConfig(
        num_blocks=rng.choice([18, 30, 200]),
        tokens_per_block=TOKENS_PER_BLOCK,
        max_tokens_per_step=rng.choice([None, 8, 16, 32]),
        overlap=overlap,
        announce_cancelled=rng.random() < 0.5,
        version=version,
        layout=layout,
        **grouped,
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("version", "layout"),
    [("1.1", "flat"), ("1.2", "flat"), ("1.3", "flat"), ("main", "flat"), ("main", "groups")],
)
def test_outputs_are_the_same_with_and_without_the_connector(
    tmp_path, monkeypatch, version, layout, overlap, seed
):
    rng = random.Random(f"{version} {layout} {overlap} {seed}")
    config = random_config(rng, version, layout, overlap)
    requests = random_requests(rng, 8)
    # 1 MiB is 85 slots here: room for some of the blocks, the rest goes through the disk.
    monkeypatch.setenv("KVTIER_CONFIG", str(patient_config(tmp_path)))
    expected = run(config, requests, seed, connected=False)
    cold = run(config, requests, seed, cancelling=0.2)
    gc.collect()
    warm = run(config, requests, seed + 1)
    gc.collect()
    assert all(part == whole[: len(part)] for part, whole in zip(cold.outputs, expected.outputs, strict=True))
    assert warm.outputs == expected.outputs
    for outcome in (cold, warm):
        assert outcome.leftovers == {}
        assert outcome.errors == {}
    if config.honour_blocks != 0 and layout == "flat":
        assert warm.external > 0


def test_a_second_engine_is_served_by_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))
    config = EngineConfig(num_blocks=128, tokens_per_block=TOKENS_PER_BLOCK)
    prompt = random.Random(1).choices(range(VOCABULARY), k=300)
    engines = [
        Engine(
            HashModel(layers=3, head_dim=64),
            config,
            leader_class=KvTierConnectorLeader,
            worker_class=KvTierConnectorWorker,
        )
        for _ in range(2)
    ]
    ids = []
    for engine in engines:
        ids.append(engine.submit(Request(prompt, 40)))
        engine.settle()
    assert engines[0].output(ids[0]) == engines[1].output(ids[1])
    assert engines[1].metrics(ids[1]).tokens_external == 296


def test_the_next_turn_loads_the_answer_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(patient_config(tmp_path)))
    config = EngineConfig(num_blocks=128, tokens_per_block=TOKENS_PER_BLOCK, overlap=True)
    connector = {"leader_class": KvTierConnectorLeader, "worker_class": KvTierConnectorWorker}
    engine = Engine(HashModel(layers=3, head_dim=64), config, **connector)
    prompt = list(range(40))
    first = engine.submit(Request(prompt, 60))
    engine.settle()
    conversation = [*prompt, *engine.output(first), 7, 8, 9]
    engine.connector.worker.close()
    engine.connector.leader.close()
    again = Engine(HashModel(layers=3, head_dim=64), config, **connector)
    second = again.submit(Request(conversation, 5))
    again.settle()
    # 40 + 60 tokens are 12 whole blocks; the KV of the last token was never computed.
    assert again.metrics(second).tokens_external == 96
