"""`agent.mode: auto`, the default: engines start the agent and share it, and leave nothing behind."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kvtier.agent.place import LOCK, agent_directory
from kvtier.config import load_config
from kvtier.engine import Request
from tests.agent_support import Place, eventually
from tests.e2e.test_connector_schedules import random_requests
from tests.faults.rank_support import EngineProcess, answers, make_engine, metrics, sockets, use_model
from tests.unit.test_engine_ranks import alive

RANKS = 2


@pytest.fixture
def place(monkeypatch, tmp_path) -> Iterator[Place]:
    place = Place(4 << 20)
    configure(monkeypatch, tmp_path, agent={"directory": str(place.directory), "linger": "10s"})
    yield place
    if (pid := agent_pid(place.directory)) is not None:
        os.kill(pid, signal.SIGKILL)
    place.remove()


@pytest.fixture
def engines() -> Iterator[list[EngineProcess]]:
    engines: list[EngineProcess] = []
    yield engines
    for engine in engines:
        engine.kill()


def configure(monkeypatch, directory: Path, **sections: object) -> None:
    """Let engines use a configuration that says nothing about who starts the agent."""
    file = directory / "kvtier.yaml"
    file.write_text(yaml.safe_dump({"memory": {"size": "4MiB"}, "lookup_wait": "250ms", **sections}))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    use_model(monkeypatch, directory)


def agent_pid(directory: Path) -> int | None:
    """Return the process id of the agent of a directory, None where none runs."""
    file = directory / LOCK
    text = file.read_text().strip() if file.exists() else ""
    return int(text) if text and alive(int(text)) else None


def serve(engine: EngineProcess, asked: list[tuple[Request, list[int]]], served: bool = True) -> None:
    """Ask until blocks come from the agent (or once), with right answers each time."""

    def loads() -> bool:
        before = engine.ask("loaded")
        outputs = engine.ask("answer", [request for request, _ in asked])
        assert outputs == [expected for _, expected in asked]
        return engine.ask("loaded") > before

    if served:
        eventually(loads, "blocks are loaded")
    else:
        loads()


@pytest.fixture
def asked(place) -> list[tuple[Request, list[int]]]:
    """Requests, and what an engine without any cache answers."""
    requests = random_requests(random.Random(11), 4)
    plain = make_engine(RANKS, connected=False)
    expected = answers(plain, requests)
    plain.close()
    return list(zip(requests, expected, strict=True))


def test_from_the_first_engine_to_the_end_of_the_idle_agent(place, engines, asked):
    # Two leaders start at once: one agent.
    engines += [EngineProcess(RANKS), EngineProcess(RANKS)]
    for engine in engines:
        serve(engine, asked)
    first = agent_pid(place.directory)
    assert first is not None
    assert place.log().count("the agent serves") == 1
    assert not (place.directory / "log.old").exists()
    assert metrics(place)["agent_clients"] == 2 * RANKS
    # It outlives them, and the next engine finds the blocks in memory.
    for engine in engines:
        engine.bury()
    hits = metrics(place)["hit_blocks_memory"]
    engines.append(EngineProcess(RANKS))
    serve(engines[-1], asked)
    assert agent_pid(place.directory) == first
    assert metrics(place)["hit_blocks_memory"] > hits
    # It is killed under the engine: misses, then another one, and the engine goes on.
    os.kill(first, signal.SIGKILL)
    serve(engines[-1], asked)
    second = agent_pid(place.directory)
    assert second not in (None, first)
    # Nobody needs it any more.
    engines[-1].bury()
    eventually(lambda: not alive(second), "the idle agent ends")
    assert sockets(place) == {}
    assert {file.name for file in place.directory.iterdir()} == {"lock", "log", "log.old"}


def test_a_configuration_of_a_size_alone_is_enough(monkeypatch, place, tmp_path, engines, asked):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.directory))
    configure(monkeypatch, tmp_path)
    directory = agent_directory(load_config())
    assert directory.parent == place.directory / "kvtier"
    engines.append(EngineProcess(RANKS))
    serve(engines[-1], asked)
    pid = agent_pid(directory)
    assert pid is not None
    engines[-1].bury()
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: not alive(pid), "the agent ends")
    assert {file.name for file in directory.iterdir()} == {"lock", "log"}


@pytest.mark.parametrize("where", ["file/agent", "/proc/kvtier"])
def test_an_engine_that_can_have_no_agent_serves_without(monkeypatch, place, tmp_path, engines, where, asked):
    (tmp_path / "file").touch()
    configure(monkeypatch, tmp_path, agent={"directory": str(tmp_path / where)})
    engines.append(EngineProcess(RANKS))
    for _ in range(2):
        serve(engines[-1], asked, served=False)
    assert engines[-1].ask("loaded") == 0
    engines[-1].bury()
