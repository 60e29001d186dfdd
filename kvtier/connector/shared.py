"""The stores that the engines of this process use: one of the process itself, or the agent's."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

from kvtier.agent.client import AgentClient, Deadlines, connect
from kvtier.config import Config
from kvtier.gpu import PinnedMemory, pin
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store.base import StoreClient


@dataclass(eq=False)
class SharedStore:
    """A store and what keeps it usable. It closes when nobody holds this object any more, or at exit.

    Attributes:
        store: The store.
        namespace: What its blocks are blocks of.
        pinned: The registration of its memory, None where there is none or a client keeps it.
        mailbox: What ranks in other processes are reached through, None where there are none.
        flush_seconds: What the end may take to write what is pending; the rest is lost to the next process.
        device: The GPU that copies from and to the store's memory, None where there is none.
    """

    store: StoreClient
    namespace: Namespace
    pinned: PinnedMemory | None
    mailbox: AgentClient | None = None
    flush_seconds: float = 0.0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        """Arrange for the end."""
        self._end = weakref.finalize(
            self, _close, os.getpid(), self.store, self.pinned, self.flush_seconds, self.device
        )

    def close(self) -> None:
        """Flush and close now; a second call does nothing."""
        self._end()


DEADLINES = Deadlines()
"""How long a call may wait for the agent."""

_lock = threading.Lock()
_open: weakref.WeakValueDictionary[tuple[str, bytes, BlockLayout], SharedStore] = (
    weakref.WeakValueDictionary()
)


def open_store(config: Config, namespace: Namespace, layout: BlockLayout) -> StoreClient:
    """Open the tiers that `config` declares."""
    # Not needed before the pool is known, and heavy: codec kernels, S3 client, disk cache.
    from kvtier.store import TieredStore

    return TieredStore.open(config, namespace, layout)


def share_store(
    config: Config, namespace: Namespace, layout: BlockLayout, device: torch.device
) -> SharedStore:
    """Return the process's store for this configuration, namespace and layout; opens it if there is none.

    Args:
        config: The tiers.
        namespace: What the blocks are blocks of.
        layout: How their bytes are arranged, all shards.
        device: Where the engine's pool lies; for a GPU the arena is pinned.

    Raises:
        ConfigError: The store cannot be opened as configured.
    """
    key = (config.model_dump_json(), namespace.id, layout)
    with _lock:
        shared = _open.get(key)
        if shared is None:
            store = open_store(config, namespace, layout)
            pinned = _pin_arena(store, device)
            shared = SharedStore(
                store, namespace, pinned, flush_seconds=config.flush_timeout, device=_gpu(device)
            )
            _open[key] = shared
        return shared


def attach_store(
    config: Config,
    namespace: Namespace,
    layout: BlockLayout,
    device: torch.device,
    session: int,
    rank: int,
    ranks: int,
) -> SharedStore:
    """Return one rank's client of the node's agent. It attaches when the agent is there; nothing waits here.

    Args:
        config: Where the agent is; rank 0 starts it if there is none and the configuration says so.
        namespace: What the blocks are blocks of.
        layout: How their bytes are arranged, all shards.
        device: Where the rank's pool lies; for a GPU the arena is pinned.
        session: The leader's name for itself, which no other engine has.
        rank: The rank.
        ranks: How many the engine has.
    """
    client = connect(
        config,
        namespace,
        layout,
        group=f"{session:x}",
        rank=rank,
        ranks=ranks,
        spawn=None if rank == 0 else False,
        prepare=partial(_pin_mapped, device) if device.type == "cuda" else None,
        wait=0.0,
        deadlines=DEADLINES,
    )
    # An agent that others started writes what is pending when this process is gone. One of the engine's own
    # may be ended with it, by whoever ends the container or the service.
    seconds = config.flush_timeout if rank == 0 and config.agent.mode == "auto" else 0.0
    return SharedStore(client, namespace, None, client, flush_seconds=seconds, device=_gpu(device))


def _gpu(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None


def _pin_mapped(device: torch.device, buffer: memoryview) -> Callable[[], None] | None:
    pinned = pin(buffer, device)
    return None if pinned is None else partial(_unpin, pinned)


def _unpin(pinned: PinnedMemory) -> None:
    # CUDA may be gone already when this runs at exit; the process's end unpins as well.
    with suppress(RuntimeError):
        pinned.unpin()


def _pin_arena(store: StoreClient, device: torch.device) -> PinnedMemory | None:
    memory = getattr(store, "memory", None)
    if device.type != "cuda" or memory is None:
        return None
    return pin(memory.buffer(), device)


def _close(
    process: int,
    store: StoreClient,
    pinned: PinnedMemory | None,
    seconds: float,
    device: torch.device | None,
) -> None:
    if os.getpid() != process:
        # A forked child has the store's connections and files, and none of its threads: it is the parent's.
        return
    if device is not None:
        # Whoever gets these slots next must not be written over by copies that nobody waits for any more.
        with suppress(RuntimeError):
            torch.cuda.synchronize(device)
    if pinned is not None:
        _unpin(pinned)
    store.close(seconds)
