"""Copies between the arena and the pool: at once on the CPU, on streams and in order on a GPU."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from kvtier._logging import log_once
from kvtier.trtllm.meta import Pages
from kvtier.trtllm.pool import Pool

_log = logging.getLogger(__name__)

Copies = Sequence[tuple[torch.Tensor, Pages]]
"""Slots, uint8 `[shard_bytes]` each, and the pages that belong to them."""

Done = Callable[[bool], None]
"""Called once when copies have ended, with whether all of them were made."""


_Pending = tuple[torch.cuda.Event, Callable[[], None]]


class Transfers(Protocol):
    """Moves blocks. None of the methods waits for the GPU, except `drain`."""

    def order(self, stream: Any) -> None:
        """Let what comes next on `stream` happen after all saves under way have read their pages."""
        ...

    def load(self, stream: Any, copies: Copies, done: Done) -> None:
        """Copy slots to pages on `stream`, before whatever follows on it; errors are raised."""
        ...

    def save(self, stream: Any, copies: Copies, done: Done) -> None:
        """Copy pages to slots, after all that was enqueued on `stream` so far; errors are told to `done`."""
        ...

    def poll(self) -> None:
        """Call `done` of everything that has ended."""
        ...

    def drain(self) -> None:
        """Wait for everything under way, and poll."""
        ...


def transfers_for(pool: Pool) -> Transfers:
    """Return what moves the blocks of this pool."""
    return CudaTransfers(pool) if pool.device.type == "cuda" else HostTransfers(pool)


def _save_all(pool: Pool, copies: Copies) -> bool:
    try:
        for slot, pages in copies:
            pool.copy_out(pages, slot)
    except Exception as error:  # noqa: BLE001 - a block less in the store is no reason to disturb the engine
        log_once(_log, "save", "blocks could not be saved: %r", error)
        return False
    return True


class HostTransfers:
    """A pool in host memory, as in the reference engine: every copy is over when the call returns."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def order(self, stream: Any) -> None:
        """Do nothing: no copy is under way."""

    def load(self, stream: Any, copies: Copies, done: Done) -> None:
        """Copy slots to pages."""
        for slot, pages in copies:
            self._pool.copy_in(slot, pages)
        done(True)

    def save(self, stream: Any, copies: Copies, done: Done) -> None:
        """Copy pages to slots."""
        done(_save_all(self._pool, copies))

    def poll(self) -> None:
        """Do nothing: nothing is under way."""

    def drain(self) -> None:
        """Do nothing: nothing is under way."""


class CudaTransfers:
    """A pool on a GPU. Loads run on the engine's stream, saves on one of their own, behind the forward pass.

    A save only reads pages of whole blocks, which no request writes again; but a page may be freed and given
    to another request before its copy has been made. So the engine's stream waits for the saves before the
    next forward pass (`order`).
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._device = pool.device
        self._side = torch.cuda.Stream(device=pool.device)  # type: ignore[no-untyped-call]
        self._loads: deque[_Pending] = deque()
        self._saves: deque[_Pending] = deque()

    def order(self, stream: Any) -> None:
        """Make the stream wait for the last save; the saves' stream runs them in order."""
        if self._saves:
            self._stream(stream).wait_event(self._saves[-1][0])

    def load(self, stream: Any, copies: Copies, done: Done) -> None:
        """Enqueue copies on the engine's stream."""
        self._enqueue(self._stream(stream), self._loads, partial(self._load_all, copies), done)

    def save(self, stream: Any, copies: Copies, done: Done) -> None:
        """Enqueue copies on the saves' stream, behind the engine's."""
        self._side.wait_stream(self._stream(stream))
        self._enqueue(self._side, self._saves, partial(_save_all, self._pool, copies), done)

    def poll(self) -> None:
        """Look which events have passed; the streams pass them in order."""
        for pending in (self._loads, self._saves):
            while pending and pending[0][0].query():  # type: ignore[no-untyped-call]
                pending.popleft()[1]()

    def drain(self) -> None:
        """Wait for both streams' last events."""
        for pending in (self._loads, self._saves):
            if pending:
                pending[-1][0].synchronize()
        self.poll()

    def _load_all(self, copies: Copies) -> bool:
        for slot, pages in copies:
            self._pool.copy_in(slot, pages)
        return True

    def _enqueue(
        self,
        stream: torch.cuda.Stream,
        pending: deque[_Pending],
        copy_all: Callable[[], bool],
        done: Done,
    ) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            made = copy_all()
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        # Copies made before one failed are under way all the same: their slots stay taken until the event.
        pending.append((event, partial(done, made)))

    def _stream(self, stream: Any) -> torch.cuda.Stream:
        return stream if isinstance(stream, torch.cuda.Stream) else torch.cuda.current_stream(self._device)
