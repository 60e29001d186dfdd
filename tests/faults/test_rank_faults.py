"""Agents, ranks and leaders that are killed or stopped while engines load and save: right tokens, no leak."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter

import pytest

from kvtier.agent.client import Deadlines
from kvtier.engine import Request
from kvtier.engine.group import RankLost
from tests.agent_support import PROCESSES, AgentProcess, eventually
from tests.e2e.test_ranks import outputs, place, random_requests, started, warm_up  # noqa: F401
from tests.unit.test_engine_ranks import alive

RANKS = 2


def expected_of(requests: list[Request]) -> list[list[int]]:
    with started(RANKS, connected=False) as plain:
        return outputs(plain, requests)


def open_files() -> Counter[str]:
    """Count this process's descriptors by kind."""
    kinds = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            kinds[os.readlink(f"/proc/self/fd/{fd}").split("[")[0]] += 1
        except OSError:
            continue
    return kinds


@pytest.mark.parametrize("seed", range(2))
def test_agents_that_are_killed_and_stopped_cost_hits_and_nothing_else(place, monkeypatch, seed):  # noqa: F811
    print("seed", seed)
    rng = random.Random(seed)
    requests = random_requests(rng, 5)
    expected = expected_of(requests)
    agent = [AgentProcess(place)]
    ended = threading.Event()

    def disturb() -> None:
        while not ended.wait(rng.random() * 0.3):
            if rng.random() < 0.5:
                agent[0].send(signal.SIGSTOP)
                ended.wait(rng.random() * 0.2)
                agent[0].send(signal.SIGCONT)
            else:
                agent[0].kill()
                ended.wait(rng.random() * 0.1)
                agent[0] = AgentProcess(place)

    with started(RANKS) as engine:
        descriptors = open_files()
        client = engine.connector.leader._runtime.ready.store
        client._deadlines = Deadlines(0.05, 0.05)
        # Arenas of agents that are gone stay for a minute; the test does not.
        client._mappings._keep = 3.0
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            for _ in range(4):
                engine.cache.pool.forget()
                assert outputs(engine, requests) == expected
        finally:
            ended.set()
            thread.join()
        # The agent is back, and so is its use.
        warm_up(engine)
        engine.cache.pool.forget()
        assert outputs(engine, requests) == expected
        before = sum(sequence.metrics.tokens_external for sequence in engine._sequences.values())
        engine.cache.pool.forget()
        assert outputs(engine, requests) == expected
        assert sum(sequence.metrics.tokens_external for sequence in engine._sequences.values()) > before

        def clean() -> bool:
            stats = engine.connector.leader.stats()
            return stats.get("store_leases") == stats.get("store_filling_slots") == 0

        eventually(clean, "no lease and no reservation is left")
        # One more arena may be held by the views of its slots, until others are used.
        eventually(lambda: sum((open_files() - descriptors).values()) <= 4, "old arenas go")
    agent[0].end()


def be_engine(seed: int, environment: dict[str, str], begun) -> None:
    """Serve for ever."""
    # The server that this process was forked from is older than the test.
    os.environ.update(environment)
    with started(RANKS) as engine:
        rng = random.Random(seed)
        begun.put([os.getpid(), *(process.pid for process in engine.ranks.processes)])
        while True:
            engine.cache.pool.forget()
            try:
                outputs(engine, random_requests(rng, 3))
            except RankLost:
                return


@pytest.mark.parametrize("seed", range(2))
def test_engines_whose_leader_or_rank_is_killed_leave_nothing_and_no_wrong_block(place, seed):  # noqa: F811
    print("seed", seed)
    rng = random.Random(seed)
    requests = random_requests(random.Random(seed), 3)
    expected = expected_of(requests)
    begun = PROCESSES.Queue()
    with AgentProcess(place), started(RANKS) as observer:
        for _ in range(4):
            engine = PROCESSES.Process(target=be_engine, args=(seed, dict(os.environ), begun))
            engine.start()
            pids = begun.get(timeout=30)
            time.sleep(rng.random() * 0.3)
            victim = rng.choice(pids)
            if rng.random() < 0.5:
                os.kill(victim, signal.SIGSTOP)
                time.sleep(0.05)
            os.kill(victim, signal.SIGKILL)
            engine.join(60)
            assert engine.exitcode is not None
            eventually(lambda pids=pids: not any(alive(pid) for pid in pids), "all of its processes end")

            def freed() -> bool:
                stats = observer.connector.leader.stats()
                return stats.get("store_leases") == stats.get("store_filling_slots") == 0

            eventually(freed, "what the engine held is free")
            observer.cache.pool.forget()
            assert outputs(observer, requests) == expected
