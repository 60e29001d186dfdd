"""A worker's half: moves blocks between the arena and this rank's part of the KV pool."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.config import load_config
from kvtier.errors import KvTierError
from kvtier.store.base import StoreClient, ticket_slot
from kvtier.trtllm.guard import shielded
from kvtier.trtllm.shared import SharedStore
from kvtier.vllm.identity import EngineFacts, config_path
from kvtier.vllm.meta import ConnectorMeta, Load, Save, WorkerMeta
from kvtier.vllm.pool import LayerPool
from kvtier.vllm.stores import open_part
from kvtier.vllm.transfer import HostTransfers

_log = logging.getLogger(__name__)


class WorkerHalf:
    """Does what the scheduler's half orders: loads before the forward pass, saves after it.

    Nothing raises. Blocks that cannot be loaded are named to the engine, which computes them (or fails their
    requests, as it is configured), and until the scheduler has heard of it nothing is saved.
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
        self._counters = Counters()
        # MLA's latents are equal on all ranks: one of them saves for all.
        self._shard = 0 if self._engine.latent else self._engine.rank
        self._saves_nothing = self._shard != self._engine.rank
        self._shared: SharedStore | None = None
        self._transfers: HostTransfers | None = None
        self._orders: ConnectorMeta | None = None
        self._settled = 0
        self._failed_step = 0
        self._failed_pages: set[int] = set()
        self._told_step = 0

    def register(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's pool, and open this rank's part of the store.

        Raises:
            LayoutError: The pool is of a kind that kvtier refuses.
            ConfigError: The store cannot be opened as configured.
        """
        pool = LayerPool(kv_caches, self._blocks, self._engine)
        self._transfers = HostTransfers(pool)
        self._shared = open_part(self._config, self._engine, pool.device, self._engine.rank)

    def bind(self, orders: ConnectorMeta) -> None:
        """Take the orders of the coming step, and read what is going to be overwritten in it."""
        if self._orders is not None and self._orders.step != orders.step:
            self._give_up(self._orders)
        self._orders, self._settled = orders, orders.settled
        if orders.tails:
            self._save(orders.tails)

    def load(self) -> None:
        """Copy promised blocks to their pages, in front of the forward pass."""
        orders = self._orders
        if orders is None or not orders.loads:
            return
        self._orders = ConnectorMeta(orders.step, orders.settled, saves=orders.saves)
        for load in orders.loads:
            self._load(load, orders.step)

    def save(self) -> None:
        """Copy whole blocks to the arena, behind the forward pass."""
        orders, self._orders = self._orders, None
        if orders is not None and orders.saves:
            self._save(orders.saves)

    def take_failed_pages(self) -> set[int]:
        """Return the pages that were not loaded since the last call."""
        failed, self._failed_pages = self._failed_pages, set()
        return failed

    def take_meta(self) -> WorkerMeta | None:
        """Return what the scheduler's half has to hear."""
        if self._told_step == self._failed_step:
            return None
        self._told_step = self._failed_step
        return WorkerMeta(self._failed_step)

    def take_counts(self) -> dict[str, int | float]:
        """Return this half's counters."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Leave the store."""
        if self._orders is not None:
            self._give_up(self._orders)
        self._orders = None
        if self._transfers is not None:
            self._transfers.close()
        self._transfers = self._shared = None

    def _store(self) -> StoreClient | None:
        return self._shared.store if self._shared is not None else None

    def _load(self, load: Load, step: int) -> None:
        store, loaded = self._store(), False
        try:
            if store is not None and self._transfers is not None and load.lease:
                loaded = self._transfers.load(store, self._shard, load.slots, load.pages, load.until)
        except (KvTierError, ValueError, IndexError, RuntimeError, OSError) as error:
            log_once(_log, "load", "promised blocks cannot be loaded: %r", error)
        if store is not None and load.lease:
            store.release(load.lease, self._engine.rank)
        if loaded:
            self._counters.add("loaded_blocks", len(load.pages))
            return
        self._failed_pages.update(load.pages)
        self._failed_step = step
        self._counters.add("load_failed_blocks", len(load.pages))

    @shielded(lambda: None)
    def _save(self, saves: Sequence[Save]) -> None:
        store = self._store()
        if store is None:
            return
        tickets = [save.ticket for save in saves]
        made = False
        try:
            if self._transfers is not None and not self._saves_nothing and not self._tainted():
                slots = [ticket_slot(ticket) for ticket in tickets]
                self._transfers.save(store, self._shard, slots, [save.page for save in saves])
                made = True
        finally:
            self._settle(store, tickets, made)

    def _settle(self, store: StoreClient, tickets: list[int], made: bool) -> None:
        if self._saves_nothing:
            return
        if made:
            store.commit(tickets, self._shard)
        else:
            store.abort(tickets, self._shard)
        self._counters.add("saved_blocks" if made else "save_failed_blocks", len(tickets))

    def _tainted(self) -> bool:
        """Say whether blocks may have been computed over such as were not loaded."""
        return self._settled < self._failed_step

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
