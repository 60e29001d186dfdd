"""An agent that answers after the deadline: one call waits, and what comes too late is undone."""

from __future__ import annotations

import threading

import pytest

from kvtier.agent import reservations
from kvtier.agent.client import Deadlines
from kvtier.store import Run
from tests.agent_support import eventually, store_of
from tests.store_support import ROOT, chain, content, read, save


class TestLateAnswers:
    """The agent answers, but after the deadline."""

    @pytest.fixture
    def slow(self, place, agent):
        """A client of little patience, and a switch that keeps the agent from answering."""
        client = place.connect()
        gate = threading.Event()
        gate.set()
        desk = agent.agent._desk
        answer = desk.answer

        def held(session, request):
            gate.wait(60)
            return answer(session, request)

        desk.answer = held
        client._deadlines = Deadlines(0.02, 0.02)
        yield client, gate
        gate.set()
        client.close(5)

    def test_one_call_waits_and_the_others_do_not(self, slow):
        client, gate = slow
        save(client, chain(2))
        gate.clear()
        assert client.match(chain(2), wait=0).slots == ()
        # A call that waited now would do so for longer than the test may take.
        client._deadlines = Deadlines(1000.0, 1000.0)
        for _ in range(50):
            assert client.match(chain(2)).slots == ()
            assert client.reserve(ROOT, 0, chain(1, seed=1)) == [None]
            assert client.hold(1) == 0.0
            client.release(1)
            client.commit([1])
            client.abort([1])
        assert client.stats()["client_timeouts"] == 1
        with client._link._lock:
            # As while the client's thread asks the agent how it is.
            assert client.match(chain(2)).slots == ()
            client.release(1)
        gate.set()
        eventually(lambda: client.connected)
        assert read(client, client.match(chain(2)).slots) == [content(block) for block in chain(2)]

    def test_a_late_lease_is_released_and_never_another_calls_answer(self, slow, agent):
        client, gate = slow
        save(client, chain(2))
        save(client, chain(3, seed=1))
        gate.clear()
        assert client.match(chain(2), wait=0).slots == ()
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        match = client.match(chain(3, seed=1))
        assert read(client, match.slots) == [content(block) for block in chain(3, seed=1)]
        eventually(lambda: client.stats()["client_late_replies"] == 1)
        eventually(lambda: client.stats()["leases"] == 1)
        client.release(match.lease)
        assert client.stats()["leases"] == 0
        assert store_of(agent).stats()["memory_pinned"] == 0

    def test_tickets_that_come_after_the_deadline_are_aborted(self, slow):
        client, gate = slow
        gate.clear()
        assert client.reserve(ROOT, 0, chain(16)) == [None] * 16
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        eventually(lambda: client.stats()["filling_slots"] == 0)
        assert save(client, chain(16, seed=1)) == 16

    def test_tickets_that_were_given_up_before_they_came_are_aborted_and_their_neighbours_not(self, slow):
        client, gate = slow
        gate.clear()
        runs = [Run(ROOT, 0, chain(2, seed=seed)) for seed in range(3)]
        first, paused, last = client.reserve_soon(runs)
        paused.give_up()
        assert paused.take() == [None, None]
        assert first.take() is None
        gate.set()
        client._deadlines = Deadlines(20.0, 20.0)
        kept = [*first.take(wait=True), *last.take(wait=True)]
        assert None not in kept
        eventually(lambda: client.stats()["filling_slots"] == 4)
        client.commit(kept)
        assert len(client.match(chain(2, seed=2)).slots) == 2
        assert None not in client.reserve(ROOT, 0, chain(2, seed=1))

    def test_tickets_that_the_engine_forgot_are_aborted(self, slow, monkeypatch):
        client, gate = slow
        now = [0.0]
        monkeypatch.setattr(client._reservations, "_clock", lambda: now[0])
        gate.clear()
        (reservation,) = client.reserve_soon([Run(ROOT, 0, chain(16))])
        now[0] = reservations.RESERVED_SECONDS + 1
        eventually(lambda: client._counters.snapshot().get("client_untaken_reservations") == 1)
        gate.set()
        client._deadlines = Deadlines(20.0, 20.0)
        eventually(lambda: client.stats().get("client_late_replies") == 1)
        eventually(lambda: client.stats()["filling_slots"] == 0)
        assert reservation.take(wait=True) == [None] * 16

    def test_what_was_taken_is_not_kept(self, slow):
        client, _ = slow
        client._deadlines = Deadlines(20.0, 20.0)
        for number in range(20):
            client.abort(client.reserve(ROOT, 0, chain(2, seed=number)))
        eventually(lambda: not client._reservations._batches)

    def test_commits_and_releases_made_meanwhile_are_not_lost(self, slow):
        client, gate = slow
        save(client, chain(1))
        client._deadlines = Deadlines(20.0, 20.0)
        match = client.match(chain(1))
        tickets = client.reserve(ROOT, 0, chain(2, seed=1))
        client._deadlines = Deadlines(0.02, 0.02)
        gate.clear()
        assert client.match(chain(1), wait=0).slots == ()
        client.commit(tickets)
        client.release(match.lease)
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        eventually(lambda: client.stats()["leases"] == 0)
        assert len(client.match(chain(2, seed=1)).slots) == 2

    def test_a_lease_is_used_without_an_answer_while_it_is_certain(self, slow):
        client, gate = slow
        now = [0.0]
        client._clock = lambda: now[0]
        client._deadlines = Deadlines(20.0, 20.0)
        save(client, chain(1))
        match = client.match(chain(1))
        gate.clear()
        client._deadlines = Deadlines(0.02, 0.02)
        now[0] = 29.0
        assert client.hold(match.lease) == 60.0
        assert client.hold(match.lease + 1) == 0.0
        now[0] = 31.0
        assert client.hold(match.lease) == 0.0
