"""What one client of an engine leaves for the others: small notes that the agent does not look into."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

MAX_NOTES = 1024
"""An engine that leaves more than that unread loses the oldest."""

MAX_NOTE_BYTES = 64 << 10


@dataclass(slots=True)
class _Note:
    data: bytes
    readers: int
    read_by: set[int] = field(default_factory=set)


class Notes:
    """The notes of one engine, by number. Each is read once by each of its readers, and gone then."""

    def __init__(self) -> None:
        self._notes: OrderedDict[int, _Note] = OrderedDict()

    def __len__(self) -> int:
        return len(self._notes)

    def leave(self, key: int, data: bytes, readers: int) -> bool:
        """Leave a note, in place of one with this number; False if it is too long."""
        if len(data) > MAX_NOTE_BYTES:
            return False
        self._notes.pop(key, None)
        self._notes[key] = _Note(data, readers)
        if len(self._notes) > MAX_NOTES:
            self._notes.popitem(last=False)
        return True

    def fetch(self, key: int, rank: int) -> bytes:
        """Return a note to one rank, once; nothing where there is none for it."""
        note = self._notes.get(key)
        if note is None or rank in note.read_by:
            return b""
        note.read_by.add(rank)
        if len(note.read_by) >= note.readers:
            del self._notes[key]
        return note.data
