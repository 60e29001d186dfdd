"""What runs in an engine's process: with an agent no codec, no disk and no bucket, in no thread of it."""

from __future__ import annotations

import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import kvtier
from kvtier.agent.client import Deadlines
from kvtier.config import load_config
from kvtier.connector import shared
from tests.agent_support import PROCESSES, AgentProcess, Place, eventually
from tests.e2e.test_connector_schedules import random_requests
from tests.faults.rank_support import answers, make_engine, use_model

PACKAGE = Path(kvtier.__file__).parent
HEAVY = ("codec", "tiers", "store", "boto3", "botocore", "diskcache", "sqlite3", "http", "zstandard")
"""Parts of kvtier, and other packages, that work on whole blocks."""

LIGHT = {"tiers/arena", "store/base", "codec/slots"}
"""Modules of these that map the arena, and say where in a slot something lies."""


def module_of(file: str) -> str:
    """Return the part of kvtier, or the package, that a source file belongs to."""
    path = Path(file)
    if path.is_relative_to(PACKAGE):
        return str(path.relative_to(PACKAGE).with_suffix(""))
    parts = path.with_suffix("").parts
    return parts[parts.index("site-packages") + 1] if "site-packages" in parts else path.parent.name


def _be_engine(environment: Mapping[str, str], seed: int, result: Any) -> None:
    """Serve cold and warm, and tell which modules' functions each thread has called meanwhile."""
    os.environ.update(environment)
    shared.DEADLINES = Deadlines(20.0, 20.0)
    calls: dict[str, set[str]] = {}
    on = [False]

    def note(frame: Any, event: str, _: Any) -> None:
        if on[0] and event == "call":
            calls.setdefault(frame.f_code.co_filename, set()).add(threading.current_thread().name)

    threading.setprofile(note)
    engine = make_engine(1)
    requests = random_requests(random.Random(seed), 4)
    leader = engine.connector.leader
    eventually(lambda: leader._runtime.ready is not None and leader.stats().get("store_memory_slots"))
    on[0] = True
    sys.setprofile(note)
    answers(engine, requests)
    eventually(lambda: not leader.stats().get("store_queued_bytes", 0))
    answers(engine, requests)
    loaded = sum(sequence.metrics.tokens_external for sequence in engine._sequences.values())
    sys.setprofile(None)
    on[0] = False
    saved = leader.stats()["store_saved_blocks"]
    heavy = Counter()
    for file, threads in calls.items():
        module = module_of(file)
        if module.split("/")[0] in HEAVY and module not in LIGHT:
            heavy.update({(thread, module): 1 for thread in threads})
    result.put((loaded, saved, sorted(heavy), sorted({module_of(file) for file in calls})))
    engine.connector.worker.close()
    engine.connector.leader.close()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Iterator[Place]:
    place = Place(0)
    use_model(monkeypatch, tmp_path)
    yield place
    place.remove()


def run(place: Place, tmp_path: Path, monkeypatch, mode: str) -> tuple[int, int, list[Any], list[str]]:
    file = tmp_path / "kvtier.yaml"
    settings = {
        "memory": {"size": "4MiB"},
        "disk": {"path": str(tmp_path / "disk"), "size": "64MiB"},
        "agent": {"mode": mode, "directory": str(place.directory)},
    }
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    place.config = load_config(file)
    result = PROCESSES.Queue()

    def serve() -> Any:
        engine = PROCESSES.Process(target=_be_engine, args=(dict(os.environ), 5, result), daemon=True)
        engine.start()
        answer = result.get(timeout=120)
        engine.join(60)
        return answer

    if mode == "inprocess":
        return serve()
    with AgentProcess(place):
        return serve()


def test_no_codec_disk_or_bucket_runs_in_the_process_of_an_engine_with_an_agent(place, tmp_path, monkeypatch):
    loaded, saved, heavy, modules = run(place, tmp_path, monkeypatch, "external")
    assert loaded > 0
    assert saved > 0
    assert {"trtllm/leader", "trtllm/worker", "hashing", "agent/client"} <= set(modules)
    assert heavy == []


def test_without_an_agent_it_is_seen(place, tmp_path, monkeypatch):
    loaded, _, heavy, _ = run(place, tmp_path, monkeypatch, "inprocess")
    assert loaded > 0
    modules = {module for _, module in heavy}
    assert {"codec/block", "store/tiered", "diskcache"} <= modules
