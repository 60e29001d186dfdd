"""The block index: where in the bucket each known block lies, answered from memory."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from kvtier.hashing import HASH_BYTES
from kvtier.tiers.s3 import index_kernels as kernels
from kvtier.tiers.s3.pack import Pack
from kvtier.tiers.s3.pack_table import BLOCK_ROW, PACK_ROW, PackTable, spread_rows
from kvtier.tiers.s3.pack_view import Holders, PackView

_GROWTH = 1.25
_FIRST_ROWS = 1024
_FULLEST = 0.75
_FEWEST_DEAD = 65_536
_REMOVED = 0
_NOBODYS = secrets.token_bytes(HASH_BYTES)
Array = np.ndarray[Any, np.dtype[Any]]


class PackEntry(NamedTuple):
    """A pack as the index knows it.

    Attributes:
        name: 16 bytes.
        entry: Tells it from another pack that had or will have the same name.
    """

    name: bytes
    entry: int


class Location(NamedTuple):
    """Where one block lies.

    Attributes:
        hash: The block.
        pack: The pack that holds it.
        offset: Where its payload starts in the pack.
        length: Bytes of the payload.
    """

    hash: bytes
    pack: PackEntry
    offset: int
    length: int


class _Columns(NamedTuple):
    """What readers look into; replaced as a whole when something grows."""

    slots: Array
    hashes: Array
    offsets: Array
    lengths: Array
    owners: Array
    packs: Array
    entries: Array


class BlockIndex:
    """Maps block hashes to packs, in about 50 bytes a block. Thread-safe; lookups take no lock.

    A block that several packs hold is known by the largest of them, because short packs are the ones to be
    merged away; of equal ones by the last, which may have been written because another could not be used.
    Quarantined locations stay out, however often a pack that lists them is added.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seed = np.uint64(secrets.randbits(64))
        self._entries = 0
        self._quarantine: dict[bytes, set[tuple[bytes, int]]] = {}
        self._clear(0)

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return the length of the longest leading run of known blocks."""
        columns, wanted = self._columns, _words(hashes)
        return int(kernels.leading(columns.slots, columns.hashes, self._seed, wanted))

    def __contains__(self, block_hash: bytes) -> bool:
        return self.match([block_hash]) == 1

    def locate(self, hashes: Iterable[bytes]) -> list[Location | None]:
        """Return where each of `hashes` lies, None for those that are not known."""
        wanted = list(hashes)
        columns = self._columns
        rows = self._rows(columns, wanted)
        owners = columns.owners[rows].tolist()
        offsets, lengths = columns.offsets[rows].tolist(), columns.lengths[rows].tolist()
        packs = {owner: _entry(columns, owner) for owner in set(owners)}
        return [
            None if row < 0 or (pack := packs[owner]) is None else Location(block, pack, offset, length)
            for block, row, owner, offset, length in zip(
                wanted, rows.tolist(), owners, offsets, lengths, strict=True
            )
        ]

    def pack(self, name: bytes) -> Pack | None:
        """Return the pack of this name, None if it has not been added or was forgotten."""
        with self._lock:
            place = self._names.get(name)
            return None if place is None else self._table([place]).pack(0)

    def names(self) -> list[bytes]:
        """Return the names of all packs."""
        with self._lock:
            return list(self._names)

    def packs(self) -> PackView:
        """Return all packs."""
        with self._lock:
            columns = self._columns
            places = np.flatnonzero(columns.entries[: self._used_packs] != _REMOVED)
            rows = columns.slots[columns.slots > 0] - 1
            served = np.bincount(columns.owners[rows], minlength=self._used_packs)
            lasts = columns.hashes[self._firsts[places] + self._counts[places] - 1]
            return PackView(
                columns.packs[places],
                _as_hashes(lasts),
                served[places],
                Holders(columns.slots, columns.hashes, columns.owners, self._seed, places),
            )

    def table(self, names: Iterable[bytes]) -> PackTable:
        """Return those packs of these names that are known."""
        with self._lock:
            places = [place for name in names if (place := self._names.get(name)) is not None]
            return self._table(places)

    def add(self, packs: PackTable | Iterable[Pack]) -> None:
        """Add packs. One that is known under the same name replaces what was known if it differs.

        A server without conditional PUT lets a second writer overwrite a pack; what was listed later holds.
        """
        table = packs if isinstance(packs, PackTable) else PackTable.of(packs)
        names = table.names()
        with self._lock:
            if len(set(names)) == len(names):
                self._add(table, names)
            else:
                for place, name in enumerate(names):
                    self._add(table.take([place]), [name])

    def forget(self, pack: PackEntry) -> None:
        """Remove a pack that is gone from the bucket, and the blocks known by it."""
        with self._lock:
            place = self._names.get(pack.name)
            if place is not None and self._columns.entries[place] == pack.entry:
                self._remove(pack.name)

    def forget_named(self, names: Iterable[bytes]) -> None:
        """Remove the packs of these names."""
        with self._lock:
            for name in names:
                if name in self._names:
                    self._remove(name)

    def quarantine(self, hashes: Iterable[bytes]) -> int:
        """Remove blocks and refuse their present locations for as long as this process lives.

        Returns:
            How many of them were known.
        """
        with self._lock:
            locations = [place for place in self.locate(dict.fromkeys(hashes)) if place is not None]
            for location in locations:
                self._quarantine.setdefault(location.pack.name, set()).add((location.hash, location.offset))
            if locations:
                columns = self._columns
                for row in self._rows(columns, [place.hash for place in locations]).tolist():
                    self._known -= kernels.remove(columns.slots, columns.hashes, self._seed, row, row + 1)
            return len(locations)

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of blocks, packs and quarantined locations."""
        return self._known, len(self._names), sum(map(len, self._quarantine.values()))

    def memory_bytes(self) -> int:
        """Return the bytes of all columns and, estimated, of the names."""
        columns = sum(int(column.nbytes) for column in (*self._columns, self._firsts, self._counts))
        return columns + 150 * len(self._names)

    def _clear(self, rows: int) -> None:
        capacity = max(_FIRST_ROWS, rows)
        self._known = self._slots_used = self._used = self._dead = self._used_packs = 0
        self._names: dict[bytes, int] = {}
        self._firsts = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int32)
        self._columns = _Columns(
            np.zeros(_slots_for(capacity), np.int32),
            np.zeros((capacity, 2), np.uint64),
            np.zeros(capacity, np.uint64),
            np.zeros(capacity, np.uint32),
            np.zeros(capacity, np.int32),
            np.zeros(0, PACK_ROW),
            np.zeros(0, np.int64),
        )

    def _rows(self, columns: _Columns, hashes: Sequence[bytes]) -> Array:
        rows = np.empty(len(hashes), np.int64)
        kernels.rows_of(columns.slots, columns.hashes, self._seed, _words(hashes), rows)
        return rows

    def _add(self, table: PackTable, names: list[bytes]) -> None:
        places = np.fromiter((self._names.get(name, -1) for name in names), np.int64, len(names))
        known = np.flatnonzero(places >= 0)
        if len(known):
            same = self._says_the_same(table, known, places[known])
            for place in known[~same].tolist():
                self._remove(names[place])
            # Entered again: their blocks may have been lost with a larger pack.
            for first, last in _runs(places[known[same]]):
                self._enter(first, last)
            places[known[~same]] = -1
        fresh = np.flatnonzero(places < 0)
        if len(fresh):
            self._append(table.take(fresh.tolist()))
        if self._dead > max(_FEWEST_DEAD, self._used // 2):
            self._compact()

    def _says_the_same(self, table: PackTable, chosen: Array, places: Array) -> Array:
        """Tell for each of the `chosen` packs of a table whether it is as the one that we have at a place."""
        same: Array = table.packs[chosen] == self._columns.packs[places]
        alike = np.flatnonzero(same)
        if len(alike):
            counts = self._counts[places[alike]].astype(np.int64)
            theirs = table.blocks[spread_rows(table.starts()[chosen[alike]], counts)]
            ours = self._blocks(spread_rows(self._firsts[places[alike]], counts))
            same[alike] = np.logical_and.reduceat(theirs == ours, np.cumsum(counts) - counts)
        return same

    def _append(self, table: PackTable) -> None:
        self._make_room(len(table.blocks), len(table))
        columns, start, end = self._columns, self._used, self._used + len(table.blocks)
        columns.hashes[start:end] = np.frombuffer(table.blocks["hash"].tobytes(), np.uint64).reshape(-1, 2)
        columns.offsets[start:end] = table.blocks["offset"]
        columns.lengths[start:end] = table.blocks["length"]
        first = self._used_packs
        last = first + len(table)
        counts = table.packs["count"].astype(np.int64)
        columns.owners[start:end] = np.repeat(np.arange(first, last, dtype=np.int32), counts)
        columns.packs[first:last] = table.packs
        self._entries += len(table)
        columns.entries[first:last] = np.arange(self._entries + 1 - len(table), self._entries + 1)
        self._firsts[first:last] = start + np.cumsum(counts) - counts
        self._counts[first:last] = counts
        self._names.update(zip(table.names(), range(first, last), strict=True))
        self._used, self._used_packs = end, last
        self._enter(first, last)

    def _enter(self, first: int, last: int) -> None:
        """Put the blocks of consecutive packs into the table."""
        start = int(self._firsts[first])
        end = int(self._firsts[last - 1]) + int(self._counts[last - 1])
        refused = np.zeros(end - start, np.bool_)
        if self._quarantine:
            self._refuse(first, last, start, refused)
        self._make_slots(end - start)
        columns = self._columns
        added = kernels.enter(
            columns.slots, columns.hashes, self._seed, columns.owners, self._counts, start, end, refused
        )
        self._known += added
        self._slots_used += added

    def _refuse(self, first: int, last: int, start: int, refused: Array) -> None:
        hashes, offsets = self._columns.hashes, self._columns.offsets
        for place in range(first, last):
            bad = self._quarantine.get(self._columns.packs[place]["name"].tobytes(), ())
            row = int(self._firsts[place])
            for at in range(row, row + int(self._counts[place]) if bad else row):
                refused[at - start] = (hashes[at].tobytes(), int(offsets[at])) in bad

    def _remove(self, name: bytes) -> None:
        place = self._names.pop(name)
        start = int(self._firsts[place])
        end = start + int(self._counts[place])
        columns = self._columns
        self._known -= kernels.remove(columns.slots, columns.hashes, self._seed, start, end)
        columns.entries[place] = _REMOVED
        self._dead += end - start

    def _table(self, places: Sequence[int]) -> PackTable:
        """Return packs as a table of their own."""
        chosen = np.asarray(places, np.int64)
        rows = spread_rows(self._firsts[chosen], self._counts[chosen].astype(np.int64))
        return PackTable(self._columns.packs[chosen], self._blocks(rows))

    def _blocks(self, rows: Any) -> Array:
        columns = self._columns
        chosen = columns.hashes[rows]
        blocks = np.empty(len(chosen), BLOCK_ROW)
        blocks["hash"] = _as_hashes(chosen)
        blocks["offset"], blocks["length"] = columns.offsets[rows], columns.lengths[rows]
        return blocks

    def _compact(self) -> None:
        """Build everything anew, aside, without the packs that were removed."""
        fresh = BlockIndex()
        fresh._seed, fresh._entries, fresh._quarantine = self._seed, self._entries, self._quarantine
        if self._names:
            fresh.add(self._table(list(self._names.values())))
        fresh._lock = self._lock
        self.__dict__.update(fresh.__dict__)

    def _make_room(self, blocks: int, packs: int) -> None:
        columns, rows = self._columns, self._used + blocks
        if self._used_packs + packs > len(columns.packs):
            size = max(int(len(columns.packs) * _GROWTH), self._used_packs + packs)
            self._firsts, self._counts = _grown(self._firsts, size), _grown(self._counts, size)
            columns = columns._replace(
                packs=_grown(columns.packs, size), entries=_grown(columns.entries, size)
            )
        if rows > len(columns.hashes):
            size = max(int(len(columns.hashes) * _GROWTH), rows)
            columns = columns._replace(
                hashes=_grown(columns.hashes, size),
                offsets=_grown(columns.offsets, size),
                lengths=_grown(columns.lengths, size),
                owners=_grown(columns.owners, size),
            )
        self._columns = columns

    def _make_slots(self, blocks: int) -> None:
        """Make sure that the table takes so many more blocks; slots of removed ones stay used until then."""
        columns = self._columns
        if self._slots_used + blocks > len(columns.slots) * _FULLEST:
            slots = np.zeros(_slots_for(self._known + blocks), np.int32)
            kernels.rehash(columns.slots, slots, columns.hashes, self._seed)
            self._columns = columns._replace(slots=slots)
            self._slots_used = self._known


def _entry(columns: _Columns, place: int) -> PackEntry | None:
    """Return a pack by its place, None if it was removed."""
    if place >= len(columns.packs) or columns.entries[place] == _REMOVED:
        return None
    return PackEntry(columns.packs[place]["name"].tobytes(), int(columns.entries[place]))


def _slots_for(rows: int) -> int:
    """Return a power of two that holds `rows` entries without being too full."""
    return int(1 << max(4, int(rows / _FULLEST)).bit_length())


def _grown(column: Array, size: int) -> Array:
    larger = np.zeros((size, *column.shape[1:]), column.dtype)
    larger[: len(column)] = column
    return larger


def _runs(places: Array) -> Iterator[tuple[int, int]]:
    """Give the runs of consecutive numbers, each as its first and the one behind its last."""
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    for run in np.split(places, cuts) if len(places) else ():
        yield int(run[0]), int(run[-1]) + 1


def _as_hashes(words: Array) -> Array:
    return np.frombuffer(words.tobytes(), "V16")


def _words(hashes: Sequence[bytes]) -> Array:
    """Return hashes as rows of two words; those of another length become one that nobody has."""
    if any(len(block_hash) != HASH_BYTES for block_hash in hashes):
        hashes = [block_hash if len(block_hash) == HASH_BYTES else _NOBODYS for block_hash in hashes]
    return np.frombuffer(bytearray().join(hashes), np.uint64).reshape(-1, 2)
