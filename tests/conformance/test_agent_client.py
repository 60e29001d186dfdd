"""The agent's client as a store client: with agents in processes of their own where the test lets them."""

from __future__ import annotations

import itertools
import time

import pytest

from tests.agent_support import AgentProcess, AgentThread, Place, namespace_of, stride_of
from tests.conformance.store_suite import StoreSuite
from tests.store_support import LAYOUT


class TestAgentClient(StoreSuite):
    """Agents of one size are one process, where each test has a namespace of its own."""

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def processes(cls):
        cls.agents = {}
        cls.numbers = itertools.count()
        yield
        for agent in cls.agents.values():
            assert agent.end() == 0, agent.place.log()
            agent.place.remove()

    @pytest.fixture(autouse=True)
    def threads(self):
        self.in_threads = []
        yield
        for agent, place in self.in_threads:
            agent.end()
            place.remove()

    def make_client(self, tiers=(), slots=16, layout=LAYOUT, clock=None):
        memory = slots * stride_of(layout)
        if tiers or clock:
            # The test holds on to the tiers or the clock.
            place = Place(memory)
            agent = AgentThread(place, tiers, clock or time.monotonic)
            self.in_threads.append((agent, place))
            return place.connect(namespace_of(layout), layout, clock=clock or time.monotonic)
        if memory not in self.agents:
            self.agents[memory] = AgentProcess(Place(memory))
        return self.agents[memory].place.connect(namespace_of(layout, test=next(self.numbers)), layout)

    def test_it_was_a_process(self, client):
        assert self.agents
        assert not self.in_threads
