"""The agent's numbers as its clients know them: each has the epoch that it is of in its upper bits.

A slot or lease has 32 bits of its own, a ticket 63; see `kvtier.store.base.ticket_slot`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvtier.agent import wire

_BITS, _TICKET_BITS = 32, 63


def of_epoch(epoch: int, number: int) -> int:
    """Return an agent's slot or lease as a client's."""
    return epoch << _BITS | number


def slots_of_epoch(epoch: int, packed: bytes) -> tuple[int, ...]:
    """Return an agent's slots, u32 one after the other, as a client's."""
    # A thousand of them in one go.
    return tuple((np.frombuffer(packed, "<u4").astype(np.int64) | epoch << _BITS).tolist())


def ticket_of_epoch(epoch: int, number: int) -> int:
    """Return an agent's ticket as a client's."""
    return epoch << _TICKET_BITS | number


def split(number: int) -> tuple[int, int]:
    """Return the epoch of a client's slot or lease, and the agent's number of it."""
    return number >> _BITS, number & (1 << _BITS) - 1


def tickets_by_epoch(tickets: Sequence[int]) -> list[tuple[int, bytes]]:
    """Return the epochs of a client's tickets, each with the agent's numbers, u64 one after the other."""
    numbers: dict[int, list[int]] = {}
    for ticket in tickets:
        numbers.setdefault(ticket >> _TICKET_BITS, []).append(ticket & (1 << _TICKET_BITS) - 1)
    return [(epoch, wire.pack_numbers(of_one, "Q")) for epoch, of_one in numbers.items()]
