"""Where the slots of the arena lie in this process's memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtier.store.base import StoreClient, slot_epoch


class SlotAddresses:
    """Addresses of one shard's part of slots, looked up when first needed.

    The views that they come from keep an arena mapped, so those of an arena that was replaced are let go of.
    """

    def __init__(self) -> None:
        self._of: tuple[StoreClient, int, int] | None = None
        self._known: dict[int, int] = {}
        self._views: list[ctypes.c_char] = []

    def find(self, store: StoreClient, shard: int, slots: Sequence[int]) -> NDArray[np.uint64]:
        """Return the address of each slot.

        Raises:
            Exception: What `StoreClient.slot_view` raises of a slot that there is not.
        """
        if slots:
            place = (store, shard, slot_epoch(slots[-1]))
            if place != self._of:
                self.clear()
                self._of = place
        known = self._known
        try:
            addresses = [known[slot] for slot in slots]
        except KeyError:
            addresses = [known.get(slot) or self._look_up(store, shard, slot) for slot in slots]
        return np.fromiter(addresses, np.uint64, len(addresses))

    def clear(self) -> None:
        """Forget everything."""
        self._of = None
        self._known = {}
        self._views = []

    def _look_up(self, store: StoreClient, shard: int, slot: int) -> int:
        view = ctypes.c_char.from_buffer(store.slot_view(slot, shard))
        self._views.append(view)
        address = ctypes.addressof(view)
        self._known[slot] = address
        return address
