"""A worker's half: moves blocks between the arena and this rank's part of the KV pool."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.codec import slot_form
from kvtier.config import load_config
from kvtier.connector.guard import shielded
from kvtier.connector.shared import SharedStore
from kvtier.connector.slots import SlotAddresses
from kvtier.connector.transfer import Blocks, Transfers
from kvtier.store.base import StoreClient, ticket_slot
from kvtier.vllm.identity import EngineFacts, config_path
from kvtier.vllm.meta import ConnectorMeta, Load, Save, WorkerMeta
from kvtier.vllm.movers import transfers_for
from kvtier.vllm.pool import LayerPool
from kvtier.vllm.stores import open_part

_log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.005
_AT_ONCE = 32
"""Blocks whose saves are begun while the engine's thread may wait for it: a millisecond of the driver."""
_BETWEEN_SECONDS = 0.0005


class _Late(NamedTuple):
    step: int
    saves: tuple[Save, ...]
    computed: Any


class WorkerHalf:
    """Does what the scheduler's half orders: loads before the forward pass, saves after it.

    Nothing raises, and nothing waits for a GPU. Blocks that cannot be loaded are named to the engine, which
    computes them (or fails their requests, as it is configured), and until the scheduler has heard of it
    nothing is saved.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        """Read the engine's configuration.

        Raises:
            ConfigError: There is no configuration of kvtier, or it is wrong.
            LayoutError: A KV cache that kvtier does not support.
        """
        self._config = load_config(config_path(vllm_config))
        self._engine = EngineFacts.read(vllm_config, kv_cache_config, self._config)
        self._blocks = int(kv_cache_config.num_blocks)
        self._sleeps = bool(getattr(vllm_config.model_config, "enable_sleep_mode", False))
        self._counters = Counters()
        # MLA's latents are equal on all ranks: one of them saves for all.
        self._shard = 0 if self._engine.latent else self._engine.rank
        self._saves_nothing = self._shard != self._engine.rank
        self._shared: SharedStore | None = None
        self._pool: LayerPool | None = None
        self._transfers: Transfers | None = None
        self._delays = False
        self._slots = SlotAddresses()
        self._orders: ConnectorMeta | None = None
        # What the engine's thread was handling when the step began, as a caller's `except` may.
        self._handled: BaseException | None = None
        self._settled = 0
        self._step = self._failed_step = 0
        self._failed_pages: set[int] = set()
        # The engine's thread, and the one that looks when copies have ended while the engine is idle.
        self._lock = threading.RLock()
        self._watcher = Workers("vllm-saves", 1)
        # Saves that are not begun: they would stand before the step's tokens on the way to the host.
        self._late: deque[_Late] = deque()
        self._under_way = 0
        self._watching = False

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's pool, and open this rank's part of the store.

        Raises:
            LayoutError: The pool is of a kind that kvtier refuses.
            ConfigError: The store cannot be opened as configured, or cannot hold this pool's blocks.
        """
        pool = LayerPool(kv_caches, self._blocks, self._engine)
        if pool.map is None and pool.device.type == "cuda":
            _log.warning("the KV pool has tokens before heads (NHD): every copy transposes, HND is faster")
        # Its map has addresses, which are good as long as its tensors are there.
        self._pool = pool
        # The store opens slots of the same form, and an agent that has others lets nobody in.
        self._transfers = transfers_for(pool, slot_form(self._engine.layout, self._config.memory.format))
        # Not in an engine that sleeps: it waits for what is under way, and takes the pool's memory away.
        self._delays = pool.device.type == "cuda" and not self._sleeps
        self._shared = open_part(self._config, self._engine, pool.device, self._engine.rank)

    @shielded(lambda: None)
    def bind(self, orders: ConnectorMeta) -> None:
        """Take the orders of the coming step, and see that what it overwrites was read before."""
        with self._lock:
            former, self._orders = self._orders, orders
            self._handled = sys.exc_info()[1]
            self._step, self._settled = orders.step, orders.settled
            if former is not None and former.step != orders.step:
                self._give_up(former)
            if self._transfers is None:
                return
            behind = orders.behind
            self._begin_late(behind)
            self._transfers.poll()
            if orders.tails:
                self._save(orders.tails, orders.step)
                behind = orders.step
            if behind:
                self._transfers.order(None, behind)

    @shielded(lambda: None)
    def load(self) -> None:
        """Copy promised blocks to their pages, in front of the forward pass."""
        with self._lock:
            orders = self._orders
            if orders is None or not orders.loads:
                return
            self._orders = ConnectorMeta(orders.step, orders.settled, saves=orders.saves)
            for load in orders.loads:
                self._load(load, orders.step)

    @shielded(lambda: None)
    def save(self) -> None:
        """Copy whole blocks to the arena, behind the forward pass."""
        with self._lock:
            orders, self._orders = self._orders, None
            if orders is None or not orders.saves:
                return
            if sys.exc_info()[1] is not self._handled:
                # The engine calls this also when its pass has failed: what lies in the pages nobody knows.
                self._give_up(orders)
                return
            # What was computed over missing blocks is refused now: once the scheduler has heard of them,
            # nothing would tell it from what was computed since.
            if not self._delays or self._settled < self._failed_step:
                self._save(orders.saves, orders.step)
                return
            computed = torch.cuda.current_stream().record_event()
            self._late.append(_Late(orders.step, orders.saves, computed))
            self._watch_on()

    def take_failed_pages(self) -> set[int]:
        """Return the pages that were not loaded since the last call."""
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def meta(self) -> WorkerMeta:
        """Return what the scheduler's half has to hear."""
        return WorkerMeta(self._step, self._failed_step)

    def take_counts(self) -> dict[str, int | float]:
        """Return this half's counters."""
        return self._counters.snapshot()

    @shielded(lambda: None)
    def close(self) -> None:
        """Finish what is under way and leave the store."""
        with self._lock:
            if self._transfers is not None:
                self._begin_late(sys.maxsize)
                self._transfers.drain()
            if self._orders is not None:
                self._give_up(self._orders)
            self._orders = None
            self._slots.clear()
            self._transfers = self._shared = self._pool = None
        self._watcher.close(1.0)

    def _store(self) -> StoreClient | None:
        return self._shared.store if self._shared is not None else None

    def _load(self, load: Load, step: int) -> None:
        store, loaded = self._store(), False
        if store is not None and self._transfers is not None and load.lease:
            try:
                self._copy_in(self._transfers, store, load)
                loaded = True
            except Exception as error:  # noqa: BLE001 - whatever it was, the engine has to be told
                log_once(_log, "load", "promised blocks cannot be loaded: %r", error)
                store.release(load.lease, self._engine.rank)
        if not loaded:
            self._failed_pages.update(load.pages)
            self._failed_step = step
            self._counters.add("load_failed_blocks", len(load.pages))

    def _copy_in(self, transfers: Transfers, store: StoreClient, load: Load) -> None:
        blocks = self._with_addresses(store, load.slots, load.pages)
        transfers.load(None, blocks, partial(self._loaded, store, load))

    def _loaded(self, store: StoreClient, load: Load, _made: bool) -> None:
        store.release(load.lease, self._engine.rank)
        self._counters.add("loaded_blocks", len(load.pages))

    def _save(self, saves: Sequence[Save], step: int) -> None:
        """Start copying blocks to their slots, which are committed when the copies have ended."""
        store = self._store()
        if store is None or self._saves_nothing:
            return
        tickets = [save.ticket for save in saves]
        done = partial(self._saved, store, tickets)
        self._under_way += 1
        if self._transfers is None or self._settled < self._failed_step:
            # Blocks may have been computed over such as were not loaded.
            done(False)
            return
        try:
            slots = [ticket_slot(ticket) for ticket in tickets]
            blocks = self._with_addresses(store, slots, [save.page for save in saves])
            self._transfers.save(None, blocks, done, step)
        except Exception as error:  # noqa: BLE001 - whatever failed, the tickets must not stay open
            log_once(_log, "save", "blocks could not be saved: %r", error)
            done(False)
        self._watch_on()

    def _begin_late(self, through: int) -> None:
        """Begin the late saves of steps up to `through`: their pages are going to be overwritten."""
        while self._late and self._late[0].step <= through:
            late = self._late.popleft()
            self._save(late.saves, late.step)

    def _begin_some(self, through: int) -> bool:
        """Begin some of the late saves of steps up to `through`, and say whether there were any."""
        if not self._late or self._late[0].step > through:
            return False
        late = self._late.popleft()
        if len(late.saves) > _AT_ONCE:
            self._late.appendleft(late._replace(saves=late.saves[_AT_ONCE:]))
        self._save(late.saves[:_AT_ONCE], late.step)
        return True

    def _watch_on(self) -> None:
        if (self._under_way or self._late) and not self._watching:
            self._watching = True
            self._watcher.run(self._keep_watch)

    def _saved(self, store: StoreClient, tickets: list[int], made: bool) -> None:
        self._under_way -= 1
        if made:
            store.commit(tickets, self._shard)
        else:
            store.abort(tickets, self._shard)
        self._counters.add("saved_blocks" if made else "save_failed_blocks", len(tickets))

    def _keep_watch(self) -> None:
        try:
            self._watch()
        except BaseException:
            # The next save has somebody look again: what waits to be begun must not become more and more.
            with self._lock:
                self._watching = False
            raise

    def _watch(self) -> None:
        """Begin and commit saves also if the engine has no further step to do it in."""
        computed, more = 0, False
        while True:
            time.sleep(_BETWEEN_SECONDS if more else _WATCH_SECONDS)
            with self._lock:
                if self._transfers is None:
                    return
                more = self._begin_some(computed)
                if more:
                    continue
                # What is computed now is begun at the next look: until then there is time for the sampling.
                computed = max([late.step for late in self._late if late.computed.query()], default=0)
                self._transfers.poll()
                if not self._under_way and not self._late:
                    self._watching = False
                    return

    def _with_addresses(self, store: StoreClient, slots: Sequence[int], pages: Sequence[int]) -> Blocks:
        return Blocks(self._slots.find(store, self._shard, slots), [(page,) for page in pages])

    def _give_up(self, orders: ConnectorMeta) -> None:
        """Release and abort what was ordered and is not going to happen: the step was called off."""
        store = self._store()
        if store is None:
            return
        for load in orders.loads:
            if load.lease:
                store.release(load.lease, self._engine.rank)
        if not self._saves_nothing:
            store.abort([save.ticket for save in orders.saves], self._shard)
        self._counters.add("orders_given_up", len(orders.loads) + len(orders.saves))
