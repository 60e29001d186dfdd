"""Copies between the arena and a pool of layers, in host memory: over when a call returns."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from kvtier.store.base import StoreClient, slot_epoch
from kvtier.vllm.pool import LayerPool


class SlotViews:
    """Views of slots, as the pool wants them, made when first needed.

    They keep an arena mapped, so those of an arena that was replaced are let go of.
    """

    def __init__(self, pool: LayerPool) -> None:
        self._pool = pool
        self._of: tuple[StoreClient, int, int] | None = None
        self._known: dict[int, list[torch.Tensor]] = {}

    def find(self, store: StoreClient, shard: int, slot: int) -> list[torch.Tensor]:
        """Return the views of one shard's part of a slot.

        Raises:
            ValueError: There is no such slot.
        """
        place = (store, shard, slot_epoch(slot))
        if place != self._of:
            self.clear()
            self._of = place
        if slot not in self._known:
            self._known[slot] = self._pool.slot(store.slot_view(slot, shard))
        return self._known[slot]

    def clear(self) -> None:
        """Forget everything."""
        self._of = None
        self._known = {}


class HostTransfers:
    """Moves blocks at once. The engine's threads that compute are idle meanwhile: it waits for the call."""

    def __init__(self, pool: LayerPool) -> None:
        self._pool = pool
        self._views = SlotViews(pool)

    def load(
        self, store: StoreClient, shard: int, slots: Sequence[int], pages: Sequence[int], until: float
    ) -> bool:
        """Copy slots to pages; False if the slots may have changed before the copies were over."""
        for slot, page in zip(slots, pages, strict=True):
            self._pool.copy_in(self._views.find(store, shard, slot), page)
        return time.monotonic() < until

    def save(self, store: StoreClient, shard: int, slots: Sequence[int], pages: Sequence[int]) -> None:
        """Copy pages to slots."""
        for slot, page in zip(slots, pages, strict=True):
            self._pool.copy_out(page, self._views.find(store, shard, slot))

    def close(self) -> None:
        """Let go of the arena."""
        self._views.clear()
