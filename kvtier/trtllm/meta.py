"""What the leader tells the workers each iteration: plain tuples of integers, small and picklable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from kvtier.connector.passes import Pages


class Load(NamedTuple):
    """Blocks of one request to be copied from the arena.

    Attributes:
        lease: The claim on the slots; each shard releases it when its copies are done.
        until: When it ends, on `time.monotonic`'s clock, which the processes of a node share; mostly never.
        blocks: Slot and pages of each block.
    """

    lease: int
    until: float
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
        number: The leader's number of this pass.
        behind: The last pass whose saves must have read their pages before this one writes to any.
    """

    session: int
    loads: tuple[Load, ...] = ()
    saves: tuple[Save, ...] = ()
    number: int = 0
    behind: int = 0


def encode_saves(saves: Sequence[Save]) -> bytes:
    """Write saves as bytes for a worker in another process."""
    return json.dumps(saves, separators=(",", ":")).encode()


def decode_saves(data: bytes) -> tuple[Save, ...]:
    """Read what `encode_saves` wrote.

    Raises:
        ValueError: It did not.
    """
    listed = json.loads(data)
    if not isinstance(listed, list):
        raise ValueError("no list of saves")
    saves = []
    for entry in listed:
        ticket, pages = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if type(ticket) is not int or not isinstance(pages, list):
            raise ValueError("no save")
        if any(type(page) is not int for page in pages):
            raise ValueError("no pages")
        saves.append(Save(ticket, tuple(pages)))
    return tuple(saves)
