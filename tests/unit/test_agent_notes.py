"""What the clients of an engine leave for each other at the agent."""

from __future__ import annotations

import pytest

from kvtier.agent.notes import MAX_NOTE_BYTES, MAX_NOTES, Notes
from kvtier.trtllm.meta import Save, decode_saves, encode_saves
from tests.agent_support import AgentThread, Place, eventually


@pytest.fixture
def place():
    place = Place()
    yield place
    place.remove()


def test_a_note_is_read_once_by_each_reader_and_gone_then():
    notes = Notes()
    assert notes.leave(7, b"text", 2)
    assert [notes.fetch(7, rank) for rank in (1, 1, 2, 2)] == [b"text", b"", b"text", b""]
    assert len(notes) == 0
    assert notes.fetch(8, 1) == b""


def test_notes_are_bounded():
    notes = Notes()
    assert not notes.leave(1, bytes(MAX_NOTE_BYTES + 1), 1)
    for key in range(MAX_NOTES + 1):
        assert notes.leave(key, b"text", 1)
    assert len(notes) == MAX_NOTES
    assert (notes.fetch(0, 1), notes.fetch(1, 1)) == (b"", b"text")


def test_notes_reach_the_other_ranks_of_the_same_engine_only(place):
    with AgentThread(place):
        engine = [place.connect(group="engine", rank=rank, ranks=3) for rank in range(3)]
        other = place.connect(group="other")
        eventually(lambda: all(client.connected for client in engine))
        assert engine[0].leave(5, b"text", 2)
        assert other.fetch(5) == b""
        assert [client.fetch(5) for client in (*engine[1:], *engine[1:])] == [b"text", b"text", b"", b""]
        for client in (*engine, other):
            client.close(1)
    assert not engine[0].leave(6, b"text", 2)
    assert engine[1].fetch(6) == b""


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
