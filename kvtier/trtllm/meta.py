"""What the leader tells the workers each iteration: plain tuples of integers, small and picklable."""

from __future__ import annotations

from typing import NamedTuple

Pages = tuple[int, ...]
"""One block's page in each layer group of the pool, -1 where it has none; a flat pool has one group."""


class Load(NamedTuple):
    """Blocks of one request to be copied from the arena.

    Attributes:
        lease: The claim on the slots; each shard releases it when its copies are done.
        blocks: Slot and pages of each block.
    """

    lease: int
    blocks: tuple[tuple[int, Pages], ...]


class Save(NamedTuple):
    """A block to be copied into the arena.

    Attributes:
        ticket: The reservation of its slot.
        pages: Where it lies.
    """

    ticket: int
    pages: Pages


class ConnectorMeta(NamedTuple):
    """The orders of one iteration.

    Attributes:
        session: Names the leader; workers follow it to the store and the tails that are its own.
        loads: To be done before the forward pass.
        saves: To be done after it.
    """

    session: int
    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
