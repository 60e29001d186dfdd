"""What an engine adapter asks of a store, wherever the store runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvtier.layout import BlockLayout


@dataclass(frozen=True, slots=True)
class Match:
    """The answer to a lookup: blocks that lie verified in the arena, leased.

    Attributes:
        lease: Handle for `StoreClient.release` and `renew`; 0 when nothing matched.
        slots: Arena slot of each block of the leading run, in order.
        sources: How many of these blocks came from each tier ("memory", "disk", "s3").
    """

    lease: int = 0
    slots: tuple[int, ...] = ()
    sources: Mapping[str, int] = field(default_factory=dict)


class StoreClient(Protocol):
    """The whole interface between an engine adapter and a store.

    No method raises, and only `match` waits, at most as long as it is told to. A slot is one block's room in
    the arena; `slot_view` gives its bytes. A ticket is a reservation of a slot that is being filled.
    """

    layout: BlockLayout

    def match(
        self, hashes: Sequence[bytes], wait: float | None = None, block_cost: float | None = None
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

        Returns:
            Verified, leased blocks. Whoever gets a lease releases it, or it expires by itself.
        """
        ...

    def renew(self, lease: int) -> bool:
        """Extend a lease by its full term; False when it has expired: its slots must not be read any more."""
        ...

    def release(self, lease: int, shard: int | None = None) -> None:
        """Give a lease up: one shard's hold on it, or (None) the whole. Unknown leases are ignored."""
        ...

    def reserve(self, parent: bytes, position: int, hashes: Sequence[bytes]) -> list[int | None]:
        """Reserve a slot for each block that the arena does not hold yet.

        Args:
            parent: Hash of the block before the first one, or the chain's root.
            position: Place of the first block in the chain.
            hashes: Hashes of consecutive blocks.

        Returns:
            A ticket for each block, or None where none is needed (held already, or being filled) or none
            is to be had (no evictable slot: skip and count, never wait).
        """
        ...

    def commit(self, tickets: Sequence[int], shard: int = 0) -> None:
        """Say that one shard's bytes are in place. A block becomes readable when every shard has said so."""
        ...

    def abort(self, tickets: Sequence[int]) -> None:
        """Give reservations up; nothing may write to their slots any more."""
        ...

    def slot_view(self, slot: int, shard: int = 0) -> memoryview:
        """Return the bytes of one shard's part of a slot, writable, `layout.shard_bytes` long."""
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
