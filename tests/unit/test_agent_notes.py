"""What the clients of an engine leave for each other at the agent."""

from __future__ import annotations

import threading

import pytest

from kvtier.agent.client import Deadlines
from kvtier.agent.notes import MAX_NOTE_BYTES, MAX_NOTE_TICKETS, MAX_NOTES, NOTE_SECONDS, Notes
from kvtier.trtllm.meta import Save, decode_saves, encode_saves
from tests.agent_support import TWO_SHARDS, AgentThread, eventually
from tests.store_support import ROOT, chain


@pytest.fixture
def given_up():
    """What ranks gave up: tickets and rank."""
    return []


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def notes(given_up, now):
    return Notes(lambda tickets, rank: given_up.append((tuple(tickets), rank)), lambda: now[0])


def test_a_note_is_read_once_by_each_reader_and_gone_then(notes, given_up):
    assert notes.leave(7, b"text", {1, 2}, [5])
    found, nothing = (b"text", [5]), (b"", ())
    assert [notes.fetch(7, rank) for rank in (1, 1, 0, 2, 2)] == [found, nothing, nothing, found, nothing]
    assert len(notes) == 0
    assert notes.fetch(8, 1) == nothing
    assert given_up == []


def test_notes_are_bounded_and_those_dropped_are_given_up(notes, given_up):
    assert not notes.leave(1, bytes(MAX_NOTE_BYTES + 1), {1}, [1])
    for key in range(MAX_NOTES + 1):
        assert notes.leave(key, b"text", {1}, [key])
    assert len(notes) == MAX_NOTES
    assert notes.fetch(0, 1) == (b"", ())
    assert notes.fetch(1, 1) == (b"text", [1])
    assert given_up == [((0,), 1)]


def test_a_note_about_too_much_is_not_taken(notes, given_up):
    assert not notes.leave(1, b"note", {1}, range(MAX_NOTE_TICKETS + 1))
    assert not notes.leave(2, bytes(MAX_NOTE_BYTES + 1), {1}, [1])
    assert notes.leave(3, bytes(MAX_NOTE_BYTES), {1}, range(MAX_NOTE_TICKETS))
    assert (len(notes), given_up) == (1, [])


def test_who_does_not_read_a_note_in_time_gives_its_tickets_up_and_never_gets_them(notes, given_up, now):
    notes.leave(1, b"text", {1, 2}, [5, 6])
    notes.fetch(1, 2)
    now[0] = NOTE_SECONDS - 1
    notes.expire()
    assert given_up == []
    now[0] = NOTE_SECONDS
    notes.expire()
    assert given_up == [((5, 6), 1)]
    assert notes.fetch(1, 1) == (b"", ())


def test_notes_reach_the_other_ranks_of_the_same_engine_only(place):
    with AgentThread(place) as agent:
        engine = [place.connect(group="engine", rank=rank, ranks=3) for rank in range(3)]
        other = place.connect(group="other")
        all_ready(agent, 4)
        tickets = engine[0].reserve(ROOT, 0, chain(1))
        assert None not in tickets
        assert engine[0].leave(5, b"text", [1, 2], tickets)
        assert other.fetch(5) == b""
        assert [client.fetch(5) for client in (*engine[1:], *engine[1:])] == [b"text", b"text", b"", b""]
        for client in (*engine, other):
            client.close(1)
    assert not engine[0].leave(6, b"text", [1, 2], tickets)
    assert engine[1].fetch(6) == b""


def test_a_rank_that_never_fetches_its_note_does_not_keep_the_slot(place):
    now = [0.0]
    with AgentThread(place, clock=lambda: now[0]) as agent:
        engine = [place.connect(layout=TWO_SHARDS, group="engine", rank=rank, ranks=2) for rank in range(2)]
        all_ready(agent, 2)
        tickets = engine[0].reserve(ROOT, 0, chain(1))
        assert engine[0].leave(5, b"text", [1], tickets)
        engine[0].commit(tickets, 0)
        assert engine[0].stats()["filling_slots"] == 1
        now[0] = NOTE_SECONDS + 1
        eventually(lambda: engine[0].stats()["filling_slots"] == 0, "the slot is free")
        assert engine[0].match(chain(1)).slots == ()
        assert engine[1].fetch(5) == b""
        for client in engine:
            client.close(1)


def test_a_note_that_comes_too_late_is_given_up_at_once(place, monkeypatch):
    with AgentThread(place) as agent:
        engine = [place.connect(layout=TWO_SHARDS, group="engine", rank=rank, ranks=2) for rank in range(2)]
        all_ready(agent, 2)
        tickets = engine[0].reserve(ROOT, 0, chain(1))
        engine[0].leave(5, b"text", [1], tickets)
        engine[0].commit(tickets, 0)
        gate, answer = threading.Event(), agent.agent._desk.answer
        monkeypatch.setattr(agent.agent._desk, "answer", lambda *a: gate.wait(60) and answer(*a))
        engine[1]._deadlines = Deadlines(0.02, 0.02)
        assert engine[1].fetch(5) == b""
        gate.set()
        eventually(lambda: engine[0].stats().get("filling_slots") == 0, "the slot is free")
        for client in engine:
            client.close(1)


def all_ready(agent: AgentThread, clients: int) -> None:
    """Wait until so many clients are attached, and have mapped the arena."""
    eventually(lambda: len(agent.agent.sessions) == clients)
    eventually(lambda: all(session.ready for session in agent.agent.sessions._by_token.values()))


def test_saves_survive_the_way_and_nonsense_does_not():
    saves = (Save(5 << 63 | 9, (1, -1)), Save(7, (3,)))
    assert decode_saves(encode_saves(saves)) == saves
    for data in (
        b"{}",
        b"[1]",
        b"[[1]]",
        b"[[1.5,[1]]]",
        b"[[1,[true]]]",
        b"[[1,2]]",
        b"\xff",
        b'[["1",[1]]]',
    ):
        with pytest.raises(ValueError, match=r"no |Expecting|decode|codec"):
            decode_saves(data)
