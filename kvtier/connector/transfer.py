"""When blocks are copied between arena and pool: at once on the CPU, on streams and in order on a GPU."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier._logging import log_once
from kvtier.connector.passes import EVERY_PASS, Pages
from kvtier.gpu.copies import Copy
from kvtier.gpu.ranges import PageMap

_log = logging.getLogger(__name__)


BATCHES = (32, 64, 128, 256, 512)
"""Blocks of the first batches, and of all that follow.

Copies begin soon, and go on while the addresses of the next batch are made.
"""


class Blocks(NamedTuple):
    """Blocks to copy.

    Attributes:
        slots: Address of each block's slot, uint64 `[blocks]`.
        pages: Its pages.
    """

    slots: NDArray[np.uint64]
    pages: Sequence[Pages]


Done = Callable[[bool], None]
"""Called once when copies have ended, with whether all of them were made."""


class Mover(Protocol):
    """How blocks are copied: what is enqueued on a stream, and over before whatever follows on it."""

    def load(self, blocks: Blocks, stream: int) -> None:
        """Copy slots to pages on the stream with this handle; where blocks may lack pages, -1 is skipped.

        Raises:
            IndexError: A page that the pool does not have.
        """
        ...

    def save(self, blocks: Blocks, stream: int) -> None:
        """Copy pages to slots on the stream with this handle.

        Raises:
            IndexError: A page that the pool does not have.
        """
        ...


class RawMover:
    """Moves blocks as they are, a batch of them with one call."""

    def __init__(self, pool_map: PageMap, copy: Copy, loads: PageMap | None = None) -> None:
        """Take what is copied, by what, and what is loaded if that is more than is saved."""
        self._map = pool_map
        self._loads = loads or pool_map
        self._copy = copy

    def load(self, blocks: Blocks, stream: int) -> None:
        """Copy slots to pages; see `Mover.load`."""
        for batch in _batches(blocks):
            pool, host, sizes = self._loads.ranges(*batch, whole=False)
            self._copy(pool, host, sizes, stream)

    def save(self, blocks: Blocks, stream: int) -> None:
        """Copy pages to slots; see `Mover.save`."""
        for batch in _batches(blocks):
            pool, host, sizes = self._map.ranges(*batch)
            self._copy(host, pool, sizes, stream)


def _batches(blocks: Blocks) -> Iterable[Blocks]:
    return (blocks,) if len(blocks.slots) <= BATCHES[0] else _several(blocks)


def _several(blocks: Blocks) -> Iterator[Blocks]:
    first = 0
    for size in chain(BATCHES, repeat(BATCHES[-1])):
        if first >= len(blocks.slots):
            return
        yield Blocks(blocks.slots[first : first + size], blocks.pages[first : first + size])
        first += size


class Transfers(Protocol):
    """Moves blocks, and knows when. None of the methods waits for the GPU, except `drain`.

    Attributes:
        behind: Whether saves go on behind the engine's back.
    """

    behind: bool

    def order(self, stream: Any, behind: int) -> None:
        """Let what comes next on `stream` happen after the saves of all passes up to `behind`."""
        ...

    def load(self, stream: Any, blocks: Blocks, done: Done) -> None:
        """Copy slots to pages after what is on `stream`, before whatever follows on it; errors are raised."""
        ...

    def save(self, stream: Any, blocks: Blocks, done: Done, number: int) -> None:
        """Copy pages to slots, after all that was enqueued on `stream` so far; errors are told to `done`.

        Args:
            stream: The engine's stream.
            blocks: What to copy.
            done: Called when it is done.
            number: The pass that they are of; `EVERY_PASS` if the engine keeps their pages until `done`.
        """
        ...

    def after_saves(self, done: Callable[[], None]) -> None:
        """Call `done` when the saves that are under way have ended."""
        ...

    def poll(self) -> None:
        """Call `done` of everything that has ended."""
        ...

    def drain(self) -> None:
        """Wait for everything under way, and poll."""
        ...


def _try_save(mover: Mover, blocks: Blocks, stream: int) -> bool:
    try:
        mover.save(blocks, stream)
    except Exception as error:  # noqa: BLE001 - a block less in the store is no reason to disturb the engine
        log_once(_log, "save", "blocks could not be saved: %r", error)
        return False
    return True


class HostTransfers:
    """A pool in host memory, as in the reference engine: every copy is over when the call returns."""

    behind = False

    def __init__(self, mover: Mover) -> None:
        self.mover = mover

    def order(self, stream: Any, behind: int) -> None:
        """Do nothing: no copy is under way."""

    def load(self, stream: Any, blocks: Blocks, done: Done) -> None:
        """Copy slots to pages."""
        self.mover.load(blocks, 0)
        done(True)

    def save(self, stream: Any, blocks: Blocks, done: Done, number: int) -> None:
        """Copy pages to slots."""
        done(_try_save(self.mover, blocks, 0))

    def after_saves(self, done: Callable[[], None]) -> None:
        """Call `done`: nothing is under way."""
        done()

    def poll(self) -> None:
        """Do nothing: nothing is under way."""

    def drain(self) -> None:
        """Do nothing: nothing is under way."""


class _Pending(NamedTuple):
    event: Any
    number: int
    done: Callable[[], None]


class CudaTransfers:
    """A pool on a GPU. Loads and saves have a stream each, joined with the engine's by events on the GPU.

    The engine's own stream may be the legacy default stream, which takes no batches of copies. A load begins
    after what the engine has enqueued so far, and what it enqueues next begins after the load: as if the
    copies stood on its stream. Saves begin behind the forward pass and run beside the next ones. These write
    to other pages, as long as a request holds its own; who may have lost them the leader knows (`order`).
    """

    behind = True

    def __init__(self, mover: Mover, loads: Any, saves: Any) -> None:
        """Take what moves the blocks, and two streams that nobody else uses."""
        self.mover = mover
        self._load_stream = loads
        self._save_stream = saves
        self._loads: deque[_Pending] = deque()
        self._saves: deque[_Pending] = deque()

    def order(self, stream: Any, behind: int) -> None:
        """Make the stream wait for the last of these saves; their stream runs them in order."""
        for pending in reversed(self._saves):
            if pending.number <= behind:
                self._engines(stream).wait_event(pending.event)
                break

    def load(self, stream: Any, blocks: Blocks, done: Done) -> None:
        """Enqueue copies between what the engine has enqueued and what it will."""
        engines = self._engines(stream)
        self._load_stream.wait_stream(engines)
        try:
            self.mover.load(blocks, self._load_stream.cuda_stream)
        finally:
            # Copies made before one failed are under way all the same: what is computed instead comes after.
            event = self._load_stream.record_event()
            engines.wait_event(event)
        self._loads.append(_Pending(event, 0, partial(done, True)))

    def save(self, stream: Any, blocks: Blocks, done: Done, number: int) -> None:
        """Enqueue copies behind what the engine has enqueued."""
        self._save_stream.wait_stream(self._engines(stream))
        made = _try_save(self.mover, blocks, self._save_stream.cuda_stream)
        # Copies made before one failed are under way all the same: their slots stay taken until the event.
        event = self._save_stream.record_event()
        self._saves.append(_Pending(event, number, partial(done, made)))

    def after_saves(self, done: Callable[[], None]) -> None:
        """Wait for what the last save waits for."""
        if self._saves:
            self._saves.append(_Pending(self._saves[-1].event, EVERY_PASS, done))
        else:
            done()

    def poll(self) -> None:
        """Look which events have passed; the streams pass them in order."""
        for pending in (self._loads, self._saves):
            while pending and pending[0].event.query():
                pending.popleft().done()

    def drain(self) -> None:
        """Wait for both streams' last events."""
        for pending in (self._loads, self._saves):
            if pending:
                pending[-1].event.synchronize()
        self.poll()

    def _engines(self, stream: Any) -> Any:
        # Who gives no stream means the current one.
        if hasattr(stream, "wait_event"):
            return stream
        return torch.cuda.current_stream(self._load_stream.device)
