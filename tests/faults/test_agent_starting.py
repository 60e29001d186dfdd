"""Agents that engines start, and that make room for each other; the command that is an agent."""

from __future__ import annotations

import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from kvtier.agent import door, wire
from kvtier.agent import launch as launch_module
from kvtier.agent.client import connect
from kvtier.agent.launch import launch
from kvtier.agent.place import HTTP, LOCK, agent_directory
from kvtier.agent.process import serve
from kvtier.config import AgentConfig, Config, DiskConfig, MemoryConfig
from kvtier.errors import ConfigError
from kvtier.store import open_tiers
from tests.agent_support import PATIENT, PROCESSES, AgentThread, Place, eventually, namespace_of
from tests.faults.test_agent_faults import be_engine, kill, recovered, start_engine
from tests.store_support import LAYOUT, chain, content, read, save
from tests.unit.test_engine_ranks import alive


@pytest.fixture
def place():
    place = Place(32 * 4096)
    yield place
    place.remove()


class TestStarting:
    """Agents that engines start."""

    @pytest.fixture
    def auto(self, place):
        place.config = Config(
            memory=MemoryConfig(size=1 << 20), agent=AgentConfig(mode="auto", directory=place.directory)
        )
        yield place
        kill_agent(place)

    def test_the_first_engine_starts_it_and_it_outlives_the_engine(self, auto):
        (engine,) = start_engine(auto, 1)
        kill(engine)
        client = auto.connect(spawn=False)
        assert read(client, client.match(chain(4)).slots) == [content(block) for block in chain(4)]
        client.close(5)

    def test_engines_that_start_at_once_end_with_one_agent(self, auto):
        ready = PROCESSES.Semaphore(0)
        engines = [
            PROCESSES.Process(target=be_engine, args=(auto, f"engine {n}", 0, 1, ready), daemon=True)
            for n in range(4)
        ]
        for engine in engines:
            engine.start()
        for _ in engines:
            assert ready.acquire(timeout=60), auto.log()
        client = auto.connect(spawn=False)
        # All of them hold something of the same store.
        assert client.stats()["leases"] == 4
        assert auto.log().count("the agent serves") == 1
        assert not (auto.directory / "log.old").exists()
        for engine in engines:
            kill(engine)
        client.close(5)

    def test_an_agent_that_was_killed_is_started_again(self, auto):
        client = auto.connect()
        assert save(client, chain(2)) == 2
        kill_agent(auto)
        eventually(lambda: not client.connected, "the agent is gone")
        recovered(client)
        assert save(client, chain(2)) == 2
        assert "the agent serves" in (auto.directory / "log.old").read_text()
        client.close(5)

    def test_a_taken_lock_means_that_somebody_else_starts_it(self, auto):
        assert launch(auto.config, auto.directory)
        assert not launch(auto.config, auto.directory)
        client = auto.connect(spawn=False)
        client.close(1)

    def test_an_agent_that_cannot_start_says_why_and_is_not_started_for_ever(self, auto, monkeypatch):
        starts = []
        original = launch_module.subprocess.run

        def counted(*arguments, **options):
            starts.append(1)
            return original(*arguments, **options)

        monkeypatch.setattr(launch_module.subprocess, "run", counted)
        monkeypatch.setattr("kvtier.agent.dialler.FIRST_LAUNCH_SECONDS", 1000.0)
        nowhere = AgentConfig(mode="auto", directory=auto.directory, http="256.256.256.256:1")
        auto.config = auto.config.model_copy(update={"agent": nowhere})
        client = auto.connect(wait=0)
        eventually(lambda: "the agent failed" in auto.log(), "the agent says why")
        assert "cannot listen" in auto.log()
        time.sleep(0.3)
        assert len(starts) == 1
        assert client.match(chain(1), wait=1000).slots == ()
        client.close(1)


def kill_agent(place: Place) -> None:
    """Kill the agent that an engine started at a place."""
    try:
        os.kill(pid_in(place.directory), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
        return


def pid_in(directory: Path) -> int:
    """Return the process id of the agent of a directory."""
    return int((directory / LOCK).read_text())


@pytest.mark.parametrize(
    ("where", "said"),
    [("file/agent", "cannot attach to the agent in .*/file/agent: "), ("/proc/kvtier", "no agent can be")],
)
def test_a_directory_that_cannot_be_used_is_said_and_a_miss(place, tmp_path, caplog, where, said):
    (tmp_path / "file").touch()
    config = Config(
        memory=MemoryConfig(size=1 << 20), agent=AgentConfig(mode="auto", directory=tmp_path / where)
    )
    client = connect(config, namespace_of(LAYOUT), LAYOUT, wait=0)
    eventually(lambda: re.search(said, caplog.text), "the reason is told")
    assert client.match(chain(1)).slots == ()
    client.close(1)


class TestRoom:
    """Idle agents end when somebody comes who needs another one."""

    @pytest.mark.parametrize("version", [0, wire.PROTOCOL_VERSION + 1], ids=["asked", "another version"])
    def test_an_agent_that_nobody_uses_ends_for_whom_it_is_of_no_use(self, place, version):
        with AgentThread(place, linger=1000.0) as agent:
            client = place.connect()
            self._come(place, version)
            assert not agent.agent.stopping
            client.close(1)
            eventually(lambda: len(agent.agent.sessions) == 0, "the client is gone")
            self._come(place, version)
            assert agent.agent.stopping
            agent.thread.join(60)
            assert not agent.thread.is_alive()

    def test_one_that_no_engine_started_stays(self, place):
        with AgentThread(place) as agent:
            self._come(place, 0)
            assert not agent.agent.stopping

    def _come(self, place: Place, version: int) -> None:
        """Say that no agent of this version is of use, and wait for the answer."""
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(place.directory / wire.DOOR))
            caller.sendall(struct.pack("<4sII", b"kvtA", version, 0))
            caller.settimeout(30)
            assert "protocol version" in wire.decode_answer(door.receive_frame(caller)).reason

    def test_agents_of_changed_configurations_follow_each_other(self, place, monkeypatch):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.directory))
        configs = [Config(memory=MemoryConfig(size=size << 20)) for size in (1, 2, 3)]
        pids = []
        try:
            clients = []
            for config in configs:
                clients.append(connect(config, namespace_of(LAYOUT), LAYOUT, deadlines=PATIENT))
                assert clients[-1].connected
                pids.append(pid_in(agent_directory(config)))
                if len(clients) == 2:
                    clients[1].close(5)
            # The second was idle when the third came; the first was not.
            eventually(lambda: not alive(pids[1]), "the idle agent ends")
            assert [alive(pid) for pid in pids] == [True, False, True]
            assert clients[0].connected
            for client in (clients[0], clients[2]):
                client.close(5)
        finally:
            for pid in pids:
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


def test_the_command_serves_until_it_is_told_to_end(place):
    file = place.directory / "kvtier.yaml"
    disk = place.directory / "disk"
    file.write_text(
        f"memory: {{size: 1MiB}}\ndisk: {{path: {disk}, size: 1GiB}}\n"
        f"agent: {{mode: external, directory: {place.directory}}}\n"
    )
    command = "import typer; from kvtier.cli.agent import agent; typer.run(agent)"
    process = subprocess.Popen(
        [sys.executable, "-c", command, "--config", str(file)], stderr=subprocess.PIPE, text=True
    )
    try:
        client = place.connect()
        address = (place.directory / HTTP).read_text().strip()
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=30) as answer:
            assert answer.status == 200
        with pytest.raises(ConfigError, match="an agent runs here already"):
            serve(place.config)
        save(client, chain(20))
        client.stats()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        client.close(1)
    finally:
        process.kill()
        process.communicate()
    assert not (place.directory / HTTP).exists()
    # It was written before the end.
    config = Config(memory=MemoryConfig(size=1 << 20), disk=DiskConfig(path=disk, size=1 << 30))
    with AgentThread(place, open_tiers(config, namespace_of(), LAYOUT)):
        client = place.connect()
        match = client.match(chain(20), wait=30)
        assert read(client, match.slots) == [content(block) for block in chain(20)]
        assert dict(match.sources) == {"disk": 20}
        client.close(5)
