"""What one client of an engine leaves for the others: small notes about reservations."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_NOTES = 1024
"""An engine that leaves more than that unread loses the oldest."""

MAX_NOTE_BYTES = 64 << 10
MAX_NOTE_TICKETS = 8192
"""More than can be told in so many bytes."""

NOTE_SECONDS = 60.0
"""Ranks fetch a note in the engine's next iteration, or never."""

GiveUp = Callable[[Sequence[int], int], None]
"""Called with tickets and the rank that will never write to their slots."""


@dataclass(slots=True)
class _Note:
    data: bytes
    tickets: Sequence[int]
    waiting: set[int]
    since: float


class Notes:
    """The notes of one engine, by number. Each is read once by each of its readers, and gone then.

    A rank that can no longer get a note gives up the reservations that it is about, at that moment.

    Args:
        give_up: How it does.
        clock: Monotonic seconds.
    """

    def __init__(self, give_up: GiveUp, clock: Callable[[], float]) -> None:
        self._give_up = give_up
        self._clock = clock
        self._notes: OrderedDict[int, _Note] = OrderedDict()

    def __len__(self) -> int:
        return len(self._notes)

    def leave(self, key: int, data: bytes, readers: set[int], tickets: Sequence[int]) -> bool:
        """Leave a note, in place of one with this number; False if it is too long."""
        if len(data) > MAX_NOTE_BYTES or len(tickets) > MAX_NOTE_TICKETS:
            return False
        self._drop(key)
        self._notes[key] = _Note(data, tickets, set(readers), self._clock())
        if len(self._notes) > MAX_NOTES:
            self._drop(next(iter(self._notes)))
        return True

    def fetch(self, key: int, rank: int) -> tuple[bytes, Sequence[int]]:
        """Return a note and its tickets to one rank, once; nothing where there is none for it."""
        note = self._notes.get(key)
        if note is None or rank not in note.waiting:
            return b"", ()
        note.waiting.remove(rank)
        if not note.waiting:
            del self._notes[key]
        return note.data, note.tickets

    def expire(self) -> None:
        """Drop the notes that were not read in time."""
        oldest = self._clock() - NOTE_SECONDS
        while self._notes:
            key, note = next(iter(self._notes.items()))
            if note.since > oldest:
                return
            self._drop(key)

    def _drop(self, key: int) -> None:
        note = self._notes.pop(key, None)
        if note is not None:
            for rank in note.waiting:
                self._give_up(note.tickets, rank)
