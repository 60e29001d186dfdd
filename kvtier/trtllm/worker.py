"""The worker: moves blocks between the arena and this rank's part of the KV pool."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.codec import slot_form
from kvtier.connector.guard import BrokenPromise, no_orders, shielded
from kvtier.connector.passes import EVERY_PASS, Pages
from kvtier.connector.slots import SlotAddresses
from kvtier.connector.transfer import Blocks, Transfers
from kvtier.store.base import StoreClient, ticket_slot
from kvtier.trtllm.fields import as_int, dig
from kvtier.trtllm.interface import KvCacheConnectorWorker, rank_here
from kvtier.trtllm.meta import ConnectorMeta, Load, Save
from kvtier.trtllm.movers import transfers_for
from kvtier.trtllm.pool import FlatPool, GroupPool, Pool
from kvtier.trtllm.runtime import Runtime, join, runtime_of

_log = logging.getLogger(__name__)


class KvTierConnectorWorker(KvCacheConnectorWorker):
    """Does what its leader's metadata says: loads before the forward pass, saves after it.

    Nothing here waits for the GPU. A load that cannot be done raises `BrokenPromise`; every other failure is
    counted, and costs cached blocks at most.
    """

    def __init__(self, llm_args: Any) -> None:
        """Find this engine's leader in the process, if it is here.

        Raises:
            ConfigError: There is no configuration, or it is wrong.
        """
        super().__init__(llm_args)
        self._counters = Counters()
        self._rank = rank_here() or as_int(dig(llm_args, "parallel_config", "rank")) or 0
        self._runtime: Runtime = join(llm_args, self._rank)
        self._session: int | None = None
        # Which part of each slot is this rank's to save.
        self._shard = self._rank
        self._pool: Pool | None = None
        self._transfers: Transfers | None = None
        self._form = ""
        self._slots = SlotAddresses()
        self._loads: tuple[Load, ...] = ()
        self._saves: tuple[Save, ...] = ()
        # Number of the pass that is bound, and of the last one whose saves must come before it.
        self._number = self._behind = 0
        # Saves that wait for `get_finished`, with the number of their pass.
        self._late: list[tuple[tuple[Save, ...], int]] = []
        self._saved_tails: list[int] = []
        self._clock: Callable[[], float] = time.monotonic
        self._stream: Any = None

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        """Take the pool as one tensor `[num_blocks, layers, kv_factor, row]`.

        Raises:
            LayoutError: The pool is of a kind that kvtier refuses.
            ConfigError: The store cannot be opened as configured.
        """
        self._register(FlatPool(kv_cache_tensor, self._runtime.engine))

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Take the pools as byte ranges in layer groups.

        Raises:
            LayoutError: The pools are of a kind that kvtier refuses.
            ConfigError: The store cannot be opened as configured.
        """
        self._register(GroupPool(layout, self._runtime.engine, self._rank))

    def bind_connector_meta(self, metadata: object) -> None:
        """Take the orders of the coming iteration; what was not done of the former ones is given up."""
        super().bind_connector_meta(metadata)
        self._begin_late()
        orders = metadata if isinstance(metadata, ConnectorMeta) else ConnectorMeta(self._session or 0)
        if self._loads or self._saves:
            self._give_up(set(self._loads) - set(orders.loads), set(self._saves) - set(orders.saves))
        self._loads, self._saves, self._number = orders.loads, orders.saves, orders.number
        # Two leaders' numbers do not compare.
        known = isinstance(metadata, ConnectorMeta) and orders.session == self._session
        self._behind = max(self._behind, orders.behind if known else EVERY_PASS)
        if isinstance(metadata, ConnectorMeta) and orders.session != self._session:
            self._follow(orders.session)

    @shielded(lambda: None)
    def start_load_kv(self, stream: Any) -> None:
        """Copy promised blocks to their pages on `stream`, in front of the forward pass.

        Raises:
            BrokenPromise: A block cannot be delivered.
        """
        loads, self._loads = self._loads, ()
        self._poll()
        try:
            if self._transfers is not None:
                self._transfers.order(stream, self._behind)
                self._behind = 0
            if loads:
                self._load(loads, stream)
        except BrokenPromise:
            raise
        except Exception as error:
            if loads:
                raise BrokenPromise(f"promised blocks cannot be copied to the pool: {error!r}") from error
            raise

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Do nothing: the loads stand in front of the whole pass on its stream."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Do nothing: whole blocks are saved after the pass; CUDA graphs do not even run this hook."""

    @shielded(lambda: None)
    def wait_for_save(self, stream: Any) -> None:
        """Copy whole blocks to the arena, behind the forward pass.

        Where copies take time they begin in `get_finished`: before that the engine sends the pass's tokens on
        their way to the host, which must not queue up behind a gigabyte of blocks.
        """
        saves, self._saves = self._saves, ()
        self._stream = stream
        if saves:
            self._late.append((saves, self._number))
            if self._transfers is None or not self._transfers.behind:
                self._begin_late()

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Start saving the last blocks of finished requests; return those whose copies have ended.

        Loads are never asynchronous, so an id that comes as loading has nothing to wait for.
        """
        self._begin_late()
        for request_id in finished_gen_req_ids:
            self._save_tail(request_id)
        self._poll()
        ended = self._saved_tails[:]
        self._saved_tails.clear()
        return ended, list(started_loading_req_ids)

    def stats(self) -> Mapping[str, int | float]:
        """Return this worker's counters."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Finish what is under way and leave; the store closes when all of the engine's parts have left.

        The engine never calls this: without it the same happens when the worker is collected, or at exit.
        """
        self._begin_late()
        if self._transfers is not None:
            self._transfers.drain()
        self._give_up(set(self._loads), set(self._saves))
        self._loads = self._saves = ()
        self._slots.clear()
        self._runtime.leave(self._rank)

    def _register(self, pool: Pool) -> None:
        # The store opens slots of the same form, and an agent that has others lets nobody in.
        form = slot_form(pool.layout, self._runtime.config.memory.format)
        # The same pool comes again with another engine's first orders: nothing may be waited for then.
        if pool is not self._pool or form.name != self._form:
            self._begin_late()
            if self._transfers is not None:
                self._transfers.drain()
            self._transfers = transfers_for(pool, form)
            self._pool, self._form = pool, form.name
        self._shard = 0 if self._runtime.replicated(pool) else self._rank
        self._runtime.register(self._rank, pool)

    @shielded(lambda: None)
    def _follow(self, session: int) -> None:
        """Go over to the engine whose leader gives the orders, should it be another one of this process."""
        self._session = session
        runtime = runtime_of(session)
        if runtime is None:
            self._runtime.follow(session)
            return
        if runtime is self._runtime:
            return
        self._runtime = runtime
        if self._pool is not None:
            self._register(self._pool)

    @shielded(lambda: None)
    def _poll(self) -> None:
        if self._transfers is not None:
            self._transfers.poll()

    def _store(self) -> StoreClient | None:
        # Orders of another engine's leader are never carried out on this one's store.
        return self._runtime.store_of(self._rank) if self._session == self._runtime.session else None

    def _saves_elsewhere(self) -> bool:
        """Say whether another rank saves what this one holds, too."""
        return self._shard != self._rank

    def _load(self, loads: Sequence[Load], stream: Any) -> None:
        store = self._store()
        if store is None or self._transfers is None:
            raise BrokenPromise("blocks were promised, and their store is closed")
        blocks = [block for load in loads for block in load.blocks]
        until = min(load.until for load in loads)
        done = partial(self._loaded, store, [load.lease for load in loads], len(blocks), until)
        self._check(until)
        self._transfers.load(stream, self._with_addresses(store, blocks), done)
        self._check(until)

    def _loaded(
        self, store: StoreClient, leases: Sequence[int], blocks: int, until: float, _made: bool
    ) -> None:
        for lease in leases:
            store.release(lease, self._rank)
        self._check(until)
        self._counters.add("loaded_blocks", blocks)

    def _check(self, until: float) -> None:
        """Make sure that slots still have what was promised; while the agent hangs, leases have an end.

        Raises:
            BrokenPromise: They may have been given away.
        """
        if until != math.inf and self._clock() >= until:
            raise BrokenPromise(
                "their lease ended before they were copied: this process or the agent stood still"
            )

    def _save(self, saves: Sequence[Save], then: Callable[[], None], number: int) -> None:
        """Start copying blocks to their slots; commits and calls `then` when the copies have ended."""
        store = self._store()
        if store is None or self._transfers is None or self._saves_elsewhere():
            then()
            return
        tickets = [save.ticket for save in saves]
        done = partial(self._saved, store, tickets, then)
        try:
            blocks = [(ticket_slot(save.ticket), save.pages) for save in saves]
            self._transfers.save(self._stream, self._with_addresses(store, blocks), done, number)
        except Exception as error:  # noqa: BLE001 - whatever failed, the tickets must not stay open
            log_once(_log, "save", "blocks could not be saved: %r", error)
            done(False)

    @shielded(lambda: None)
    def _begin_late(self) -> None:
        late, self._late = self._late, []
        for saves, number in late:
            self._save(saves, lambda: None, number)

    def _saved(self, store: StoreClient, tickets: list[int], then: Callable[[], None], made: bool) -> None:
        if made:
            store.commit(tickets, self._shard)
        else:
            store.abort(tickets, self._shard)
        self._counters.add("saved_blocks" if made else "save_failed_blocks", len(tickets))
        then()

    def _save_tail(self, request_id: int) -> None:
        end = partial(self._saved_tails.append, request_id)
        # Until its leader is known for certain, a worker could take the tail of another engine's request.
        certain = self._session is not None and self._session == self._runtime.session
        saves = self._take_tail(request_id) if certain else ()
        if saves:
            self._save(saves, end, EVERY_PASS)
        elif self._transfers is not None:
            self._transfers.after_saves(end)
        else:
            end()

    @shielded(no_orders)
    def _take_tail(self, request_id: int) -> tuple[Save, ...]:
        return self._runtime.take_tail(request_id, self._rank)

    def _with_addresses(self, store: StoreClient, blocks: Sequence[tuple[int, Pages]]) -> Blocks:
        slots = self._slots.find(store, self._shard, [slot for slot, _ in blocks])
        return Blocks(slots, [pages for _, pages in blocks])

    def _give_up(self, loads: set[Load], saves: set[Save]) -> None:
        """Release and abort what was ordered and is not going to happen: the pass was called off."""
        if not loads and not saves:
            return
        store = self._store()
        if store is not None:
            for load in loads:
                store.release(load.lease, self._rank)
            if not self._saves_elsewhere():
                store.abort([save.ticket for save in saves], self._shard)
        self._counters.add("orders_given_up", len(loads) + len(saves))
