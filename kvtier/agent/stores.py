"""The agent's stores, one for each namespace, and how they share its memory."""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvtier._logging import log_once
from kvtier.agent.pages import PagePool
from kvtier.codec import SlotForm, slot_form
from kvtier.errors import ConfigError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore
from kvtier.tiers import Tier
from kvtier.tiers.arena import PAGE_BYTES, MappedMemory, stride
from kvtier.tiers.memory import MemoryTier

_log = logging.getLogger(__name__)

WARM_SECONDS = 600.0
"""A store without clients keeps its share of the memory for so long when others could use it."""

MAX_EPOCH = (1 << 31) - 1

OpenTiers = Callable[[Namespace, BlockLayout], Sequence[Tier]]


@dataclass(eq=False, slots=True)
class OpenStore:
    """A store that is open.

    Attributes:
        store: The store.
        epoch: Number of this opening.
        pages: Pages of one slot.
        users: How many clients it has.
        idle_since: When the last one left.
        ended: Set once it has been flushed and closed.
    """

    store: TieredStore
    epoch: int
    pages: int
    users: int = 0
    idle_since: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)


class Stores:
    """Opens a store when the first client of its namespace comes, and keeps it when the last one goes.

    All stores lie in one arena of fixed size, which clients map (and pin) once. Open stores have equal shares
    of it. When a namespace is new, stores without clients are closed, and the others give up their highest
    slots, whatever lies there; slots that are leased or being filled follow when that ends. So no page is in
    two stores, and none is ever taken back from under a reader.

    Attributes:
        memory: The arena.
        arena: Random number of the arena.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        memory_bytes: int,
        open_tiers: OpenTiers,
        *,
        slot_format: str = "raw",
        flush_timeout: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Map the arena; `slot_format` is how blocks lie in it.

        Raises:
            ConfigError: `memory_bytes` is less than a page.
            OSError: The kernel refuses the memory.
        """
        pages = memory_bytes // PAGE_BYTES
        if pages < 1:
            raise ConfigError(f"{memory_bytes} bytes are less than a page of memory")
        self.memory = MappedMemory.anonymous(pages * PAGE_BYTES)
        self.arena = secrets.randbits(63)
        self._pool = PagePool(pages)
        self._open_tiers = open_tiers
        self._slot_format = slot_format
        self._flush_timeout = flush_timeout
        self.clock = clock
        # Opening tiers takes time: `_opening` is held meanwhile, `_lock` never for long.
        self._opening = threading.Lock()
        self._lock = threading.Lock()
        self._open: dict[tuple[bytes, BlockLayout], OpenStore] = {}
        self._closing: list[OpenStore] = []
        # Another agent's epochs are others with near certainty, those of this one for certain.
        self._epochs = itertools.count(secrets.randbits(31))
        self._closed = False

    def join(self, namespace: Namespace, layout: BlockLayout) -> OpenStore:
        """Return the store of a namespace for one more client; opens it when there is none.

        Raises:
            ConfigError: The memory is too small, a tier cannot be opened as configured, or the agent ends.
        """
        key = (namespace.id, layout)
        # Without waiting for one that is being opened.
        known = self._join_known(key)
        if known is not None:
            return known
        with self._opening:
            known = self._join_known(key)
            if known is not None:
                return known
            with self._lock:
                form = slot_form(layout, self._slot_format)
                self._check_room(form)
            memory = MemoryTier.within(self.memory, form.slot_bytes)
            tiers = self._open_tiers(namespace, layout)
            store = TieredStore(namespace, layout, memory, tiers, form=form, clock=self.clock)
            with self._lock:
                opened = OpenStore(
                    store, next(self._epochs) % MAX_EPOCH + 1, memory.slot_stride // PAGE_BYTES, 1
                )
                for other, unused in list(self._open.items()):
                    if not unused.users:
                        self._end(other)
                self._open[key] = opened
                self._share_out()
        _log.info("opened the store of namespace %s with %d slots", namespace.hex, memory.slots)
        return opened

    def _join_known(self, key: tuple[bytes, BlockLayout]) -> OpenStore | None:
        with self._lock:
            known = self._open.get(key)
            if known is not None:
                known.users += 1
            return known

    def leave(self, opened: OpenStore) -> None:
        """Count one client less; the store stays open."""
        with self._lock:
            opened.users -= 1
            opened.idle_since = self.clock()

    def tend(self) -> None:
        """Hand on pages that became free; close what was long without clients while others are not."""
        with self._lock:
            for opened in [*self._open.values(), *self._closing]:
                opened.store.expire()
            long_ago = self.clock() - WARM_SECONDS
            if any(opened.users for opened in self._open.values()):
                for key, opened in list(self._open.items()):
                    if not opened.users and opened.idle_since <= long_ago:
                        self._end(key)
            self._share_out()

    def open_stores(self) -> list[OpenStore]:
        """Return the stores that are open now."""
        with self._lock:
            return list(self._open.values())

    def stats(self) -> dict[str, int | float]:
        """Return gauges of the arena."""
        with self._lock:
            return {
                "stores": len(self._open),
                "closing_stores": len(self._closing),
                "arena_bytes": self.memory.length,
                "arena_free_bytes": self._pool.free * PAGE_BYTES,
            }

    def close(self, timeout: float) -> None:
        """Flush and close all stores at the same time, within `timeout` seconds. The arena stays mapped.

        Leases stay as they are: what a client reads at this moment does not change.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._closed = True
            ending = list(self._open.values())
            self._open.clear()
            for opened in ending:
                self._close_in_background(opened, timeout)
            ending += self._closing
        for opened in ending:
            opened.ended.wait(max(0.0, deadline - time.monotonic()) + 1.0)

    def _check_room(self, form: SlotForm) -> None:
        if self._closed:
            raise ConfigError("the agent is ending")
        used = [opened for opened in self._open.values() if opened.users]
        needed = max([stride(form.slot_bytes), *(opened.pages * PAGE_BYTES for opened in used)])
        share = self._pool.total // (len(used) + 1) * PAGE_BYTES
        if share < needed:
            raise ConfigError(
                f"memory.size: {self.memory.length} bytes for {len(used) + 1} namespaces do not hold one"
                f" block of {needed} bytes for each"
            )

    def _end(self, key: tuple[bytes, BlockLayout]) -> None:
        opened = self._open.pop(key)
        opened.store.memory.shrink(0)
        self._closing.append(opened)
        self._close_in_background(opened, self._flush_timeout)

    def _close_in_background(self, opened: OpenStore, timeout: float) -> None:
        def close() -> None:
            try:
                opened.store.close(timeout)
            except Exception as error:  # noqa: BLE001 - a tier's defect must not keep the agent from ending
                log_once(_log, "close", "closing a store failed: %r", error)
            finally:
                opened.ended.set()

        threading.Thread(target=close, name="kvtier-close", daemon=True).start()

    def _share_out(self) -> None:
        share = self._pool.total // max(1, len(self._open))
        for opened in self._open.values():
            wanted = share // opened.pages
            if opened.store.memory.slots > wanted:
                opened.store.memory.shrink(wanted)
        for opened in [*self._open.values(), *self._closing]:
            left = opened.store.memory.take_left()
            if left:
                self._pool.give(left, opened.pages)
        for opened in self._open.values():
            missing = share // opened.pages - opened.store.memory.slots
            if missing > 0:
                opened.store.memory.grow(self._pool.take(opened.pages, missing))
        self._closing = [
            opened for opened in self._closing if not opened.ended.is_set() or opened.store.memory.leaving
        ]
