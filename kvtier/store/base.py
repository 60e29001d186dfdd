"""What an engine adapter asks of a store, wherever the store runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvtier.layout import BlockLayout


@dataclass(frozen=True, slots=True)
class Match:
    """The answer to a lookup: blocks that lie verified in the arena, leased.

    Attributes:
        lease: Handle for `StoreClient.release` and `hold`; 0 when nothing matched.
        slots: Arena slot of each block of the leading run, in order.
        sources: How many of these blocks came from each tier ("memory", "disk", "s3").
        ask_again: Seconds for which it pays to ask again, since more blocks are on their way; then nothing is
            leased yet, and `sources` counts these, too. 0.0: this is the answer.
    """

    lease: int = 0
    slots: tuple[int, ...] = ()
    sources: Mapping[str, int] = field(default_factory=dict)
    ask_again: float = 0.0


class Run(NamedTuple):
    """Consecutive blocks of one chain.

    Attributes:
        parent: Hash of the block before the first one, or the chain's root.
        position: Place of the first block in the chain.
        hashes: Their hashes.
    """

    parent: bytes
    position: int
    hashes: Sequence[bytes]


class Reservation(Protocol):
    """Slots that were asked for, the answer perhaps still under way."""

    def take(self, wait: bool = False) -> list[int | None] | None:
        """Return the tickets, once; what is not taken within some seconds is given up by itself.

        Args:
            wait: Whether to wait for the answer, up to the client's deadline. If none comes the reservation
                is given up.

        Returns:
            A ticket for each block, or None where none is needed (held already, or being filled) or none is
            to be had (no evictable slot: skip and count, never wait); None as long as there is no answer.
        """
        ...

    def give_up(self) -> None:
        """Give back what is granted and was not taken, also where the answer comes later. Never waits."""
        ...


class Granted:
    """A reservation whose answer is known.

    Args:
        tickets: The answer.
        abort: Gives tickets back.
    """

    __slots__ = ("_abort", "_tickets")

    def __init__(self, tickets: list[int | None], abort: Callable[[list[int]], None]) -> None:
        self._tickets = tickets
        self._abort = abort

    def take(self, wait: bool = False) -> list[int | None] | None:
        """Return the tickets; see `Reservation.take`."""
        tickets, self._tickets = self._tickets, [None] * len(self._tickets)
        return tickets

    def give_up(self) -> None:
        """Give the tickets back; see `Reservation.give_up`."""
        tickets = [ticket for ticket in self.take() or () if ticket is not None]
        if tickets:
            self._abort(tickets)


class StoreClient(Protocol):
    """The whole interface between an engine adapter and a store.

    No method raises. `match` waits at most as long as it is told to; `hold` and `reserve` are answered at
    once, where the store is another process within a short deadline; nothing else waits. A slot is one
    block's room in the arena; `slot_view` gives its bytes. A ticket is a reservation of a slot that is being
    filled.

    Slots change hands only when nobody can be using them any more: no shard loses one because it is late.
    A lease that was not held yet ends by itself; a held one ends when every shard has released it, and a
    reservation when every shard has said how its copy ended; or when the engine's processes are gone.
    """

    layout: BlockLayout

    def match(
        self,
        hashes: Sequence[bytes],
        wait: float | None = None,
        block_cost: float | None = None,
        ask_again: float = 0.0,
    ) -> Match:
        """Find the longest leading run of `hashes` that can be promised now.

        Blocks that lie resident in the arena count at once; for those after them that another tier holds,
        fetching starts in the background, and `match` waits for them to arrive, as long as that pays: not
        for what is expected later than `wait`, nor for what is computed sooner than it arrives. What arrives
        later serves the next lookup.

        Args:
            hashes: Chained block hashes of one prompt, in order, 16 bytes each.
            wait: Seconds to wait at most; None: the configured lookup wait; 0: not at all.
            block_cost: Seconds that the engine takes to compute one block, if it is known.
            ask_again: Seconds that the caller can wait further, outside of this call.

        Returns:
            Verified, leased blocks. Whoever gets a lease releases it, or it expires by itself.
        """
        ...

    def hold(self, lease: int) -> float:
        """Take a lease that is going to be used: from now on it ends only by `release`.

        Returns:
            Until when, on `time.monotonic`'s clock, it is certain that nothing changes in its slots: they
            must neither be read nor have been read later than that. Infinity once it is held; 0.0 when the
            lease is over.
        """
        ...

    def release(self, lease: int, shard: int | None = None) -> None:
        """Give a lease up: one shard's hold on it, or (None) the whole. Unknown leases are ignored."""
        ...

    def reserve(self, parent: bytes, position: int, hashes: Sequence[bytes]) -> list[int | None]:
        """Reserve a slot for each block of a `Run` that the arena does not hold yet; see `Reservation`."""
        ...

    def reserve_soon(self, runs: Sequence[Run]) -> list[Reservation]:
        """Do the same for several runs at once, without waiting for the answer."""
        ...

    def commit(self, tickets: Sequence[int], shard: int = 0) -> None:
        """Say that one shard's bytes are in place. A block becomes readable when every shard has said so."""
        ...

    def abort(self, tickets: Sequence[int], shard: int | None = None) -> None:
        """Give reservations up.

        Args:
            tickets: The reservations.
            shard: Whose bytes are not going to be written any more: the block never becomes readable, and
                its slot is free when each of the other shards has committed or given up. None: nobody was
                told to write, and the slot is free at once.
        """
        ...

    def slot_view(self, slot: int, shard: int = 0) -> memoryview:
        """Return the bytes of one shard's part of a slot, writable, in the form of the store's slots."""
        ...

    def stats(self) -> Mapping[str, int | float]:
        """Return counters and gauges of the store and its tiers, named `<part>_<what>`."""
        ...

    def close(self, timeout: float = 10.0) -> None:
        """Write what is pending to the lower tiers within `timeout` seconds, then free everything."""
        ...


def ticket_slot(ticket: int) -> int:
    """Return the slot of a ticket.

    From the lowest bit on, a ticket has 32 bits of place in the arena, 31 of generation, and the epoch: the
    arena's number where a process sees several in its life, as clients of an agent do. A slot has 32 bits of
    place and the epoch. Both are opaque to engines.
    """
    return (ticket >> 63) << 32 | (ticket & 0xFFFFFFFF)


def slot_epoch(slot: int) -> int:
    """Return the epoch of a slot; see `ticket_slot`."""
    return slot >> 32
