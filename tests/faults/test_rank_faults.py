"""Agents, ranks and leaders that are killed or stopped while engines load and save: right tokens, no leak.

`KVTIER_FAULT_ROUNDS=50 pytest tests/faults/test_rank_faults.py` runs the schedules longer, and
`KVTIER_FAULT_SEED` others.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
import yaml

from kvtier.config import DiskConfig
from kvtier.engine import Engine, Request
from tests.agent_support import AgentProcess, Place, eventually
from tests.e2e.test_connector_schedules import random_requests
from tests.faults.rank_support import (
    EngineProcess,
    Holding,
    answers,
    holding,
    make_engine,
    metrics,
    sockets,
    use_model,
)

ROUNDS = int(os.environ.get("KVTIER_FAULT_ROUNDS", "0"))
SEED = int(os.environ.get("KVTIER_FAULT_SEED", "1"))
MEMORY = 4 << 20
QUIET = ("leases", "filling_slots", "memory_pinned", "agent_closing_stores")
"""What the agent counts and must be zero when nothing is under way."""

MOST_THREADS, MOST_DISK_FILES = 64, 64
"""An agent has so many threads, and files of its disk tier, at most."""


@pytest.fixture
def place(monkeypatch, tmp_path, request) -> Iterator[Place]:
    """An agent's directory, with a disk tier."""
    disk = {"path": tmp_path / "disk", "size": 64 << 20}
    place = Place(MEMORY, disk=DiskConfig(**disk))
    file = tmp_path / "kvtier.yaml"
    settings = {
        "memory": {"size": MEMORY},
        "agent": {"mode": "external", "directory": str(place.directory)},
        "lookup_wait": "250ms",
    }
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    use_model(monkeypatch, tmp_path)
    yield place
    place.remove()


class Schedule:
    """One engine and one agent, which die and are started anew."""

    def __init__(self, place: Place, ranks: int, seed: str) -> None:
        print("seed", seed)
        self.place = place
        self.ranks = ranks
        self.rng = random.Random(seed)
        self.plain: Engine = make_engine(ranks, connected=False)
        self.known = self._requests(4)
        self.agent = AgentProcess(place)
        self.engine = EngineProcess(ranks)
        try:
            # The first agent of an installation compiles its kernels.
            self.settle(seconds=300)
        except BaseException:
            self.close()
            raise
        # What a fresh agent and a fresh engine hold, and this process with them.
        self.least = self.engine.holdings()
        self.least_agent = self.agent_holding()
        self.least_here = holding()
        # Between the order and the answer.
        self.span = 0.1

    def _requests(self, count: int) -> list[tuple[Request, list[int]]]:
        """Return requests and what an engine without any cache answers."""
        requests = random_requests(self.rng, count)
        return list(zip(requests, answers(self.plain, requests), strict=True))

    def round(self) -> None:
        """Kill or stop somebody while the engine loads blocks that are known, and saves new ones."""
        asked = [*self.known, *self._requests(2)]
        self.rng.shuffle(asked)
        victim = self.rng.choice(["agent", *range(self.ranks)])
        action = self.rng.choice(["kill", "stop", "stop and kill"])
        print(victim, action)
        pid = self.agent.pid if victim == "agent" else self.engine.pids[victim]
        begun = time.monotonic()
        self.engine.order("answer", [request for request, _ in asked])
        time.sleep(self.rng.random() * self.span)
        outputs: list[list[int]] | None = []
        if action != "kill":
            os.kill(pid, signal.SIGSTOP)
            if victim == "agent" and self.rng.random() < 0.5:
                # An engine needs no agent that answers.
                outputs = self.engine.result()
            else:
                time.sleep(self.rng.random() * 0.3)
        if action == "stop":
            os.kill(pid, signal.SIGCONT)
        elif victim == "agent":
            self.agent.kill()
            time.sleep(self.rng.random() * 0.1)
            self.agent = AgentProcess(self.place)
        else:
            os.kill(pid, signal.SIGKILL)
        outputs = outputs or self.engine.result()
        if outputs is not None:
            assert outputs == [expected for _, expected in asked]
            self.span = min(time.monotonic() - begun, 0.5)
        if victim != "agent" and action != "stop":
            self.engine.bury()
            self.engine = EngineProcess(self.ranks)
        else:
            assert outputs is not None, "the engine ended, and nobody killed it"
        self.settle()
        self.check()

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until the engine is served from its agent again, with right answers."""

        def served() -> bool:
            before = self.engine.ask("loaded")
            asked = [*self.known, *self._requests(1)]
            assert self.engine.ask("answer", [request for request, _ in asked]) == [
                expected for _, expected in asked
            ]
            return self.engine.ask("loaded") > before

        eventually(served, "the engine loads", seconds)

    def agent_holding(self) -> Holding:
        """Return what the agent holds; threads and files of the disk come by and by, up to a bound."""
        kinds = holding(self.agent.pid)
        assert kinds.pop("threads") <= MOST_THREADS
        assert kinds.pop("disk", 0) <= MOST_DISK_FILES
        return kinds

    def check(self) -> None:
        """See that nothing is held by anybody that was not held in the beginning."""

        quiet = {**dict.fromkeys(QUIET, 0.0), "agent_clients": float(self.ranks)}

        def under_way() -> dict[str, float]:
            values = metrics(self.place)
            return {name: values.get(name, -1.0) for name in quiet}

        try:
            same(under_way, quiet)
        except AssertionError:
            print(metrics(self.place), self.place.log(), self.engine.ask("leader"))
            raise
        same(self.engine.holdings, self.least)
        same(self.agent_holding, self.least_agent)
        same(holding, self.least_here)
        assert sockets(self.place) == {"door": 1 + self.ranks, "desk": 1 + self.ranks}

    def close(self) -> None:
        """End everybody at once."""
        self.agent.kill()
        self.engine.kill()
        self.plain.close()

    def end(self) -> None:
        """End everybody; see that no process, socket or file is left but the lock and the log."""
        self.engine.bury()
        self.plain.close()
        assert self.agent.end() == 0
        assert sockets(self.place) == {}
        assert {file.name for file in self.place.directory.iterdir()} == {"lock", "log"}


def same(count: Callable[[], object], least: object) -> None:
    """Wait until somebody holds what he held in the beginning."""
    last = [count()]

    def back() -> bool:
        last[0] = count()
        return last[0] == least

    try:
        eventually(back)
    except AssertionError:
        assert last[0] == least


@pytest.mark.timeout(480 + 20 * ROUNDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_whoever_is_killed_or_stopped_the_tokens_are_right_and_nothing_is_left(place, ranks):
    with closing(Schedule(place, ranks, f"{SEED} {ranks}")) as schedule:
        for number in range(ROUNDS or 8):
            print("round", number, end=" ")
            schedule.round()
        schedule.end()
