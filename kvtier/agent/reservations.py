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
"""Tickets that nobody has taken by then are given up: the request was cancelled, or is not scheduled.

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
    __slots__ = ("_batch", "_over", "_owner", "_run", "_size")

    def __init__(self, owner: Reservations, batch: _Batch, run: int, size: int) -> None:
        self._owner = owner
        self._batch = batch
        self._run = run
        self._size = size
        # Whoever has waited in vain takes no tickets that come later: they are given up as untaken.
        self._over = False

    def take(self, wait: bool = False) -> list[int | None] | None:
        """Return the tickets; see `Reservation.take`."""
        batch = self._batch
        if not self._over and self._owner.look(batch.answer, wait) is None and self._run in batch.untaken:
            self._over = wait
            return [None] * self._size if wait else None
        place = None if self._over else batch.untaken.pop(self._run, None)
        return [None] * self._size if place is None else batch.tickets(*place)


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

    def ask(self, runs: Sequence[Run]) -> list[Reservation]:
        """Ask for the slots of several runs."""
        if sum(len(run.hashes) for run in runs) > wire.MAX_BLOCKS:
            half = len(runs) // 2
            if not half:
                return [Granted([None] * len(run.hashes)) for run in runs]
            return self.ask(runs[:half]) + self.ask(runs[half:])
        request = wire.Reserve(0, 0, [(parent, first, b"".join(hashes)) for parent, first, hashes in runs])
        answer = self._link.ask(request)
        if answer is None:
            self._counters.add("client_missed_reservations")
            return [Granted([None] * len(run.hashes)) for run in runs]
        sizes = [len(run.hashes) for run in runs]
        batch = _Batch(answer, self._clock(), sizes)
        self._batches.append(batch)
        return [_Pending(self, batch, run, size) for run, size in enumerate(sizes)]

    def look(self, answer: Answer, wait: bool) -> wire.AnyReply | None:
        """Return the agent's answer if it is here, or (`wait`) comes in time."""
        return self._link.wait_for(answer, self._patience()) if wait else answer.reply

    def expire(self) -> None:
        """Give up the tickets that nobody has taken in time; for one thread."""
        oldest = self._clock() - RESERVED_SECONDS
        while self._batches and self._batches[0].since <= oldest:
            batch = self._batches.popleft()
            places = [place for run in list(batch.untaken) if (place := batch.untaken.pop(run, None))]
            if not places:
                continue
            self._counters.add("client_untaken_reservations", len(places))
            if self._link.renounce(batch.answer) is None:
                continue
            untaken = [ticket for place in places for ticket in batch.tickets(*place) if ticket is not None]
            for epoch, numbers in tickets_by_epoch(untaken):
                self._link.post(wire.Abort(0, 0, numbers, -1), epoch)
