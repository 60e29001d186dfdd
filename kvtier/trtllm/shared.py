"""The stores of this process, one for each configuration, namespace and layout; the last to leave closes."""

from __future__ import annotations

import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass

import torch

from kvtier.config import Config
from kvtier.gpu import PinnedMemory, pin
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store.base import StoreClient

CLOSE_SECONDS = 10.0
"""What is not in the lower tiers by then is lost to the next process, not to correctness."""


@dataclass(eq=False)
class SharedStore:
    """A store and what keeps it usable. It closes when nobody holds this object any more, or at exit.

    Attributes:
        store: The store.
        namespace: What its blocks are blocks of.
    """

    store: StoreClient
    namespace: Namespace
    pinned: PinnedMemory | None

    def __post_init__(self) -> None:
        """Arrange for the end."""
        self._end = weakref.finalize(self, _close, self.store, self.pinned)

    def close(self) -> None:
        """Flush and close now; a second call does nothing."""
        self._end()


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
            shared = SharedStore(store, namespace, _pin_arena(store, device))
            _open[key] = shared
        return shared


def _pin_arena(store: StoreClient, device: torch.device) -> PinnedMemory | None:
    memory = getattr(store, "memory", None)
    if device.type != "cuda" or memory is None:
        return None
    return pin(memory.buffer(), device)


def _close(store: StoreClient, pinned: PinnedMemory | None) -> None:
    if pinned is not None:
        # CUDA may be gone already when this runs at exit; the process's end unpins as well.
        with suppress(RuntimeError):
            pinned.unpin()
    store.close(CLOSE_SECONDS)
