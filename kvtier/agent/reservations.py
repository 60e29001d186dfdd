"""Reservations that a client has asked for, until their tickets are taken."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.agent import wire
from kvtier.agent.epochs import ticket_of_epoch, tickets_by_epoch
from kvtier.agent.link import Answer, Link
from kvtier.store.base import Granted, Reservation, Run

_log = logging.getLogger(__name__)

RESERVED_SECONDS = 60.0
"""Tickets that nobody has taken or given up by then are given up: an engine has forgotten them.

They are taken in the pass after the one that asked: a prefill without a GPU takes many seconds.
"""


class _Batch:
    """The runs of one message.

    Attributes:
        answer: The agent's answer.
        since: When it was asked.
        untaken: Where each run's tickets stand in the answer. Whoever takes an entry out owns its tickets.
    """

    __slots__ = ("_size", "_tickets", "answer", "since", "untaken")

    def __init__(self, answer: Answer, since: float, sizes: Sequence[int]) -> None:
        self.answer = answer
        self.since = since
        self.untaken: dict[int, tuple[int, int]] = {}
        start = 0
        for run, size in enumerate(sizes):
            self.untaken[run] = start, start + size
            start += size
        self._size = start
        self._tickets: list[int | None] | None = None

    def tickets(self, start: int, end: int) -> list[int | None]:
        """Return the tickets at a place of the answer, None where there is none."""
        if self._tickets is None:
            self._tickets = self._read()
        return self._tickets[start:end]

    def _read(self) -> list[int | None]:
        reply = self.answer.reply
        if not isinstance(reply, wire.Reserved):
            return [None] * self._size
        size = len(reply.tickets)
        if size != 8 * self._size:
            log_once(_log, "tickets", "the agent granted %d bytes of tickets for %d", size, self._size)
            return [None] * self._size
        epoch = self.answer.epoch
        return [
            None if number == wire.NO_TICKET else ticket_of_epoch(epoch, number)
            for number in wire.unpack_numbers(reply.tickets, "Q")
        ]


class _Pending:
    __slots__ = ("_batch", "_owner", "_run", "_size")

    def __init__(self, owner: Reservations, batch: _Batch, run: int, size: int) -> None:
        self._owner = owner
        self._batch = batch
        self._run = run
        self._size = size

    def take(self, wait: bool = False) -> list[int | None] | None:
        """Return the tickets; see `Reservation.take`."""
        batch = self._batch
        if self._run in batch.untaken and self._owner.look(batch.answer, wait) is None:
            if not wait:
                return None
            self.give_up()
        place = batch.untaken.pop(self._run, None)
        return [None] * self._size if place is None else batch.tickets(*place)

    def give_up(self) -> None:
        """Give the tickets back; see `Reservation.give_up`."""
        self._owner.give_up(self._batch, self._run)


class Reservations:
    """Asks the agent for slots, in one message for all runs of a call.

    Args:
        link: The connection.
        counters: Where to count.
        patience: Seconds that `take` may wait.
        clock: Monotonic seconds.
    """

    def __init__(
        self, link: Link, counters: Counters, patience: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        self._link = link
        self._counters = counters
        self._patience = patience
        self._clock = clock
        self._batches: deque[_Batch] = deque()
        # What was given up, by the place in its batch's answer.
        self._unwanted: deque[tuple[_Batch, tuple[int, int]]] = deque()

    def ask(self, runs: Sequence[Run]) -> list[Reservation]:
        """Ask for the slots of several runs."""
        if sum(len(run.hashes) for run in runs) > wire.MAX_BLOCKS:
            half = len(runs) // 2
            if not half:
                return [_none(run) for run in runs]
            return self.ask(runs[:half]) + self.ask(runs[half:])
        request = wire.Reserve(0, 0, [(parent, first, b"".join(hashes)) for parent, first, hashes in runs])
        answer = self._link.ask(request)
        if answer is None:
            self._counters.add("client_missed_reservations")
            return [_none(run) for run in runs]
        sizes = [len(run.hashes) for run in runs]
        batch = _Batch(answer, self._clock(), sizes)
        self._batches.append(batch)
        return [_Pending(self, batch, run, size) for run, size in enumerate(sizes)]

    def look(self, answer: Answer, wait: bool) -> wire.AnyReply | None:
        """Return the agent's answer if it is here, or (`wait`) comes in time."""
        return self._link.wait_for(answer, self._patience()) if wait else answer.reply

    def give_up(self, batch: _Batch, run: int) -> None:
        """Have one run's tickets aborted, as soon as they are here."""
        place = batch.untaken.pop(run, None)
        if place is not None:
            self._unwanted.append((batch, place))

    def expire(self) -> None:
        """Abort the tickets that were given up, or not taken in time; for one thread."""
        oldest = self._clock() - RESERVED_SECONDS
        batches = self._batches
        while batches and (not batches[0].untaken or batches[0].since <= oldest):
            batch = batches.popleft()
            for run in list(batch.untaken):
                self._counters.add("client_untaken_reservations")
                self.give_up(batch, run)
        for _ in range(len(self._unwanted)):
            batch, place = self._unwanted.popleft()
            if batch.answer.reply is None:
                if batch.since > oldest:
                    self._unwanted.append((batch, place))
                    continue
                if self._link.renounce(batch.answer) is None:
                    continue
            tickets = [ticket for ticket in batch.tickets(*place) if ticket is not None]
            for epoch, numbers in tickets_by_epoch(tickets):
                self._link.post(wire.Abort(0, 0, numbers, -1), epoch)


def _none(run: Run) -> Granted:
    return Granted([None] * len(run.hashes), lambda tickets: None)
