"""Slots that a client has asked for: what it makes of the agent's answers."""

from __future__ import annotations

import pytest

from kvtier.agent import wire
from kvtier.agent.link import Answer
from kvtier.agent.reservations import _Batch

EPOCH = 3


def answered(tickets: bytes) -> _Batch:
    answer = Answer(EPOCH, wire.Reserved(1, tickets))
    return _Batch(answer, 0.0, [2, 1])


def test_each_run_gets_its_own_part_of_the_answer():
    batch = answered(wire.pack_numbers([7, wire.NO_TICKET, 9], "Q"))
    assert batch.tickets(*batch.untaken[0]) == [EPOCH << 63 | 7, None]
    assert batch.tickets(*batch.untaken[1]) == [EPOCH << 63 | 9]


@pytest.mark.parametrize("size", [0, 8, 12, 16, 20, 32])
def test_an_answer_of_another_length_grants_nothing(size):
    """Numbers that are there must not slide to blocks that they are not of."""
    batch = answered(wire.pack_numbers([7, 8, 9, 10], "Q")[:size])
    assert batch.tickets(*batch.untaken[0]) == [None, None]
    assert batch.tickets(*batch.untaken[1]) == [None]


def test_another_kind_of_answer_grants_nothing():
    batch = _Batch(Answer(EPOCH, wire.Done(1, True)), 0.0, [2, 1])
    assert batch.tickets(*batch.untaken[0]) == [None, None]
