"""Processes that die while a GPU copies for them: what it may still be writing to, nobody else gets."""

from __future__ import annotations

import pytest

from kvtier.agent.sessions import DEATH_SECONDS
from kvtier.store import ticket_slot
from tests.agent_support import AgentThread, Place, eventually, namespace_of
from tests.store_support import ROOT, chain, save

LOW = 0xFFFFFFFF
SLOTS, RESERVED = 16, 3


@pytest.fixture
def clock() -> list[float]:
    return [100.0]


@pytest.fixture
def agent(place: Place, clock: list[float]):
    with AgentThread(place, clock=lambda: clock[0]) as agent:
        yield agent


def die_while_saving(place: Place, agent: AgentThread, *, gpu: bool, ranks: int = 1) -> set[int]:
    """Let an engine of one namespace end while it fills slots and reads others; returns those it fills."""
    options = {"group": "victim", "ranks": ranks, "prepare": (lambda memory: None) if gpu else None}
    clients = [place.connect(rank=rank, **options) for rank in range(ranks)]
    assert save(clients[0], chain(2)) == 2
    assert clients[0].match(chain(2)).lease
    tickets = clients[0].reserve(ROOT, 0, chain(RESERVED, seed=1))
    assert None not in tickets
    for client in clients:
        # As the kernel does it: no word to the agent.
        client._link.close(1)
    eventually(lambda: len(agent.agent.sessions) == 0)
    return {ticket_slot(ticket) & LOW for ticket in tickets}


@pytest.mark.parametrize("ranks", [1, 2])
def test_slots_that_a_gpu_may_be_writing_to_stay_taken_for_a_while(place, agent, clock, ranks):
    dangerous = die_while_saving(place, agent, gpu=True, ranks=ranks)
    (opened,) = agent.stores.open_stores()
    stats = opened.store.stats()
    assert (stats["filling_slots"], stats["dying_slots"], stats["leases"]) == (0, RESERVED, 0)
    other = place.connect()
    for _ in range(2):
        taken = other.reserve(ROOT, 0, chain(SLOTS, seed=2))
        assert sum(ticket is not None for ticket in taken) == SLOTS - RESERVED
        assert dangerous.isdisjoint(ticket_slot(ticket) & LOW for ticket in taken if ticket is not None)
        # Nor are these blocks served to anybody.
        assert other.match(chain(RESERVED, seed=1)).slots == ()
        other.abort([ticket for ticket in taken if ticket is not None])
        eventually(lambda: opened.store.stats()["filling_slots"] == 0)
        clock[0] += DEATH_SECONDS / 2 - 0.1
    clock[0] += 0.3
    eventually(lambda: opened.store.stats()["dying_slots"] == 0, "the agent's loop sees to it")
    assert None not in other.reserve(ROOT, 0, chain(SLOTS, seed=3))
    other.close(1)


def test_without_a_gpu_a_copy_ends_with_its_process(place, agent):
    die_while_saving(place, agent, gpu=False)
    (opened,) = agent.stores.open_stores()
    stats = opened.store.stats()
    assert (stats["filling_slots"], stats["dying_slots"], stats["leases"]) == (0, 0, 0)
    other = place.connect()
    assert None not in other.reserve(ROOT, 0, chain(SLOTS, seed=2))
    other.close(1)


def test_they_are_not_handed_to_another_namespace_either(place, agent, clock):
    dangerous = die_while_saving(place, agent, gpu=True)
    other = place.connect(namespace_of(model="another"))
    eventually(lambda: [opened.store.memory.slots for opened in agent.stores.open_stores()] == [13])
    taken = other.reserve(ROOT, 0, chain(SLOTS, seed=2))
    assert dangerous.isdisjoint(ticket_slot(ticket) & LOW for ticket in taken if ticket is not None)
    clock[0] += DEATH_SECONDS
    eventually(lambda: [opened.store.memory.slots for opened in agent.stores.open_stores()] == [SLOTS])
    eventually(lambda: agent.stores.stats()["closing_stores"] == 0)
    other.close(1)
