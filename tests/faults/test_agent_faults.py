"""Agents and engines that are stopped, killed and started anew: no wrong byte, no wait but one, no leak."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest

from kvtier.agent.client import Deadlines
from kvtier.store import ticket_slot
from tests.agent_support import PATIENT, PROCESSES, AgentProcess, Place, eventually
from tests.store_support import ROOT, chain, content, read, save

SHORT = Deadlines(0.05, 0.05)
ENDLESS = Deadlines(1000.0, 1000.0)
"""Longer than a test may take: a call that waits although it should not fails the test."""


@pytest.fixture
def place():
    place = Place(32 * 4096)
    yield place
    place.remove()


def descriptors(pid: int | str = "self") -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def recovered(client) -> None:
    """Wait until a client works again."""
    eventually(lambda: client.connected, "the agent can be used again")


class TestStopped:
    def test_costs_one_deadline_and_nothing_is_lost(self, place):
        with AgentProcess(place) as agent:
            client = place.connect()
            save(client, chain(4))
            match = client.match(chain(4))
            agent.send(signal.SIGSTOP)
            client._deadlines = SHORT
            assert client.match(chain(4), wait=0).slots == ()
            client._deadlines = ENDLESS
            for _ in range(100):
                assert client.match(chain(4)).slots == ()
                assert client.reserve(ROOT, 0, chain(1, seed=1)) == [None]
            assert client.stats()["client_timeouts"] == 1
            # What was promised before stays readable, and the lease holds by the client's own clock.
            assert client.hold(match.lease) > time.monotonic()
            assert read(client, match.slots) == [content(block) for block in chain(4)]
            agent.send(signal.SIGCONT)
            recovered(client)
            again = client.match(chain(4))
            assert again.slots == match.slots
            client.release(again.lease)
            client.release(match.lease)
            eventually(lambda: client.stats()["leases"] == 0, "the late lease is released")
            client.close(5)

    def test_an_agent_that_is_killed_while_stopped_is_noticed(self, place):
        agent = AgentProcess(place)
        client = place.connect(deadlines=SHORT)
        agent.send(signal.SIGSTOP)
        client.match(chain(1), wait=0)
        agent.kill()
        with AgentProcess(place):
            recovered(client)
            client._deadlines = ENDLESS
            assert save(client, chain(2)) == 2
            client.close(5)


class TestKilled:
    def test_a_call_under_way_ends_when_the_agent_dies(self, place):
        agent = AgentProcess(place)
        client = place.connect(deadlines=ENDLESS)
        agent.send(signal.SIGSTOP)
        found = []
        caller = threading.Thread(target=lambda: found.append(client.match(chain(1), wait=0)))
        caller.start()
        agent.kill()
        caller.join(60)
        assert found[0].slots == ()
        client.close(1)

    def test_what_was_promised_can_still_be_read(self, place):
        agent = AgentProcess(place)
        client = place.connect()
        save(client, chain(4))
        match = client.match(chain(4))
        agent.kill()
        eventually(lambda: not client.connected, "the agent is gone")
        with AgentProcess(place):
            recovered(client)
            save(client, chain(32, seed=3))
            assert read(client, match.slots) == [content(block) for block in chain(4)]
            assert client.match(chain(4)).slots == ()
            client.close(5)

    def test_sockets_of_a_killed_agent_are_replaced(self, place):
        agent = AgentProcess(place)
        place.connect().close(1)
        agent.kill()
        left = {file.name for file in place.directory.iterdir()}
        assert {"door", "desk"} <= left
        with AgentProcess(place) as agent:
            client = place.connect()
            assert save(client, chain(2)) == 2
            client.close(5)
        assert agent.end() == 0
        assert {file.name for file in place.directory.iterdir()} == {"lock", "log"}


@pytest.mark.parametrize("seed", range(3))
def test_any_schedule_of_stops_kills_and_restarts_serves_right_bytes(place, seed):
    rng = random.Random(seed)
    print("seed", seed)
    ended = threading.Event()
    failures: list[object] = []
    served = [0]

    def engine(number: int) -> None:
        own = random.Random(1000 * seed + number)
        client = place.connect(deadlines=SHORT, wait=0)
        try:
            while not ended.is_set():
                hashes = chain(own.randrange(1, 6), seed=own.randrange(4))
                match = client.match(hashes, wait=0.01)
                expected = [content(block) for block in hashes[: len(match.slots)]]
                if read(client, match.slots) != expected:
                    failures.append(("wrong bytes", number, len(match.slots)))
                if own.random() < 0.8:
                    client.release(match.lease)
                tickets = client.reserve(ROOT, 0, hashes)
                for block, ticket in zip(hashes, tickets, strict=True):
                    if ticket is not None:
                        client.slot_view(ticket_slot(ticket))[:] = content(block)
                taken = [ticket for ticket in tickets if ticket is not None]
                (client.commit if own.random() < 0.8 else client.abort)(taken)
                if match.slots:
                    served[0] += 1
                else:
                    time.sleep(0.001)
        except Exception as error:
            failures.append(error)
        finally:
            client.close(0.1)

    threads = [threading.Thread(target=engine, args=(number,)) for number in range(3)]
    agent = AgentProcess(place)
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            before = served[0]
            eventually(lambda before=before: served[0] > before + 5 or failures, "blocks are served")
            time.sleep(rng.random() * 0.02)
            if rng.random() < 0.5:
                agent.send(signal.SIGSTOP)
                time.sleep(rng.random() * 0.2)
                agent.send(signal.SIGCONT)
            else:
                agent.kill()
                time.sleep(rng.random() * 0.1)
                agent = AgentProcess(place)
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)
        agent.end()
    assert failures == []


def test_fifty_agents_leave_nothing_in_the_engine(place, monkeypatch):
    monkeypatch.setattr("kvtier.agent.link.LAST_RETRY_SECONDS", 0.05)
    clock = [0.0]
    client = place.connect(wait=0, clock=lambda: clock[0])

    def clean():
        clock[0] += 100.0
        client._link._ring()
        return client.stats()["client_arenas"] == 1 and (descriptors(), threading.active_count()) <= least

    least = (1 << 30, 1 << 30)
    for number in range(50):
        with AgentProcess(place) as agent:
            recovered(client)
            assert save(client, chain(3, seed=number)) == 3
            assert len(client.match(chain(3, seed=number)).slots) == 3
            if number % 3:
                agent.send(signal.SIGSTOP)
                client._deadlines = SHORT
                client.match(chain(1), wait=0)
                client._deadlines = PATIENT
                agent.send(signal.SIGCONT)
            agent.kill()
        eventually(lambda: not client.connected, "the agent is gone")
        eventually(clean, "what belonged to the agent is gone")
        if number < 5:
            least = (descriptors(), threading.active_count())
    assert len(client._certain) <= 1
    client.close(1)
    assert {file.name for file in place.directory.iterdir()} <= {"door", "desk", "lock", "log", "http"}


def be_engine(place: Place, group: str, rank: int, ranks: int, ready) -> None:
    """Attach, hold a lease and reservations, and wait to be killed."""
    client = place.connect(group=group, rank=rank, ranks=ranks)
    if rank == 0:
        hashes = chain(4)

        def holds_a_lease():
            save(client, hashes)
            return client.match(hashes).lease

        eventually(holds_a_lease, "all ranks are there")
        client.reserve(ROOT, 0, chain(5, seed=1))
    # Answered after all that was sent before.
    client.stats()
    ready.release()
    time.sleep(1000)


def start_engine(place: Place, ranks: int, group: str = "engine"):
    """Start an engine of one process a rank, and wait until it holds something."""
    ready = PROCESSES.Semaphore(0)
    processes = [
        PROCESSES.Process(target=be_engine, args=(place, group, rank, ranks, ready), daemon=True)
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=60), place.log()
    return processes


def kill(process) -> None:
    """Kill an engine's process."""
    process.kill()
    process.join(30)


def test_fifty_engines_that_are_killed_leave_nothing_in_the_agent(place):
    with AgentProcess(place) as agent:
        observer = place.connect()
        counts = []
        for number in range(50):
            (process,) = start_engine(place, 1, f"engine {number}")
            stats = observer.stats()
            assert (stats["leases"], stats["filling_slots"]) == (1, 5)
            kill(process)

            def freed():
                stats = observer.stats()
                return (stats["leases"], stats["filling_slots"], stats["memory_pinned"]) == (0, 0, 0)

            eventually(freed, "what the engine held is free")
            counts.append((descriptors(agent.pid), len(os.listdir(f"/proc/{agent.pid}/task"))))
        assert len(set(counts[5:])) == 1, counts
        assert save(observer, chain(28, seed=9)) == 28
        observer.close(5)


@pytest.mark.parametrize("first", [0, 1], ids=["leader", "rank"])
def test_an_engine_of_two_ranks_that_loses_one_is_promised_nothing(place, first):
    with AgentProcess(place):
        observer = place.connect()
        processes = start_engine(place, 2)
        held = observer.stats()
        assert (held["leases"], held["filling_slots"]) == (1, 5)
        kill(processes[first])
        # The other may still be copying.
        held = observer.stats()
        assert (held["leases"], held["filling_slots"]) == (1, 5)
        kill(processes[1 - first])
        eventually(lambda: observer.stats()["filling_slots"] == 0, "the reservations are free")
        eventually(lambda: observer.stats()["leases"] == 0, "the leases are free")
        observer.close(5)
