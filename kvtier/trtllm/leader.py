"""The leader: promises blocks to the scheduler, and tells the workers what to load and what to save."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.connector.adapters import Adapters
from kvtier.connector.guard import BrokenPromise, no_orders, shielded
from kvtier.connector.hash_cache import HashCache
from kvtier.connector.passes import EVERY_PASS, Pages
from kvtier.trtllm.fields import as_int, dig
from kvtier.trtllm.interface import KvCacheConnectorScheduler
from kvtier.trtllm.meta import ConnectorMeta, Load, Save
from kvtier.trtllm.offers import Offers
from kvtier.trtllm.request import Identity, Promise, RequestState, note_unsupported, token_array
from kvtier.trtllm.running import RunningSaves
from kvtier.trtllm.runtime import LEADER, Ready, Runtime, join, new_session
from kvtier.trtllm.table import RequestTable

_log = logging.getLogger(__name__)


_Grown = tuple[int, RequestState, int]
"""A request's id, its state, and its whole blocks, of which some are new."""


class KvTierConnectorLeader(KvCacheConnectorScheduler):
    """Answers the scheduler from what lies verified in host memory, and never asynchronously.

    A promise cannot be taken back, so only leased blocks are promised, and the loads are put into the
    metadata before anything that may fail. Whatever else goes wrong is counted, and is a miss.
    """

    def __init__(self, llm_args: Any) -> None:
        """Found this engine's place in the process; the pool, and with it the store, comes later.

        Raises:
            ConfigError: There is no configuration, or it is wrong.
        """
        super().__init__(llm_args)
        self._counters = Counters()
        self._session = new_session()
        self._runtime: Runtime = join(llm_args, LEADER, self._session)
        self._requests = RequestTable()
        self._adapters = Adapters()
        self._offers = Offers()
        self._running = RunningSaves()
        self._hashes: HashCache | None = None
        self._nothing = ConnectorMeta(self._session)
        if dig(llm_args, "kv_cache_config", "enable_block_reuse") is False:
            log_once(
                _log,
                "no-reuse",
                "kv_cache_config.enable_block_reuse is off: nothing is ever loaded, blocks are only saved",
            )

    @shielded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Promise the blocks that follow the local match, as far as they can be loaded at once.

        Args:
            request: The engine's request.
            num_computed_tokens: Tokens matched in the GPU's pool.

        Returns:
            Tokens that can be loaded beyond them, a multiple of the block size that leaves at least one
            token of the prompt to be computed; and False: the load happens in front of the next pass.
        """
        ready = self._runtime.ready
        if ready is None:
            # Its store does not open, or, without an agent, its workers live in other processes.
            self._counters.add("lookups_not_ready")
            log_once(_log, "not-ready", "not all ranks of the engine share a store: nothing is cached")
            return 0, False
        self._counters.add("lookups")
        state = self._meet(request, ready)
        self._drop_promise(state, ready)
        tokens = token_array(request.get_tokens(0))
        state.see_tokens(tokens)
        size = state.tokens_per_block
        if state.identity is None:
            return 0, False
        if num_computed_tokens % size:
            self._counters.add("lookups_inside_block")
            log_once(
                _log,
                "partial",
                "a local match ends inside a block, and nothing can be loaded behind it: set"
                " kv_cache_config.enable_partial_reuse to false",
            )
            return 0, False
        prompt = min(len(tokens), as_int(getattr(request, "prompt_len", None)) or len(tokens))
        first, last = num_computed_tokens // size, (prompt - 1) // size
        if first >= last:
            return 0, False
        match = ready.store.match(state.hash_through(last)[first:last])
        blocks = len(match.slots)
        self._counters.add("looked_up_tokens", (last - first) * size)
        if blocks == 0:
            return 0, False
        state.promise = Promise(match.lease, first, match.slots)
        state.request = request
        for tier, count in match.sources.items():
            self._counters.add(f"promised_tokens_{tier}", count * size)
        return blocks * size, False

    @shielded(lambda: None)
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Note the pages that a request was given; also asked when block reuse is off."""
        self._see_allocation(request, [list(block_ids)])

    @shielded(lambda: None)
    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: Sequence[list[int]]
    ) -> None:
        """Note the pages that a request was given in each layer group."""
        self._see_allocation(request, [list(pages) for pages in block_ids_by_layer_group])

    def build_connector_meta(self, scheduler_output: Any) -> ConnectorMeta:
        """Give the orders for the coming pass: every promised block is loaded, every whole block saved.

        Raises:
            BrokenPromise: A promised block cannot be loaded.
        """
        ready = self._runtime.ready
        behind = EVERY_PASS
        try:
            windows = ready is not None and any(group.window is not None for group in ready.groups)
            behind = self._running.begin(scheduler_output, windows)
            promised, grown = self._advance(scheduler_output)
            kept = [self._keep_promise(state, ready) for state in promised]
            loads = tuple([load for load in kept if load is not None])
        except Exception as error:
            if isinstance(error, BrokenPromise) or self._requests.promised():
                raise BrokenPromise(f"promised blocks cannot be loaded: {error}") from error
            self._counters.add("errors_build_connector_meta")
            log_once(_log, "build", "the engine's batch cannot be read, nothing of it is cached: %r", error)
            return self._nothing._replace(behind=behind)
        saves = self._saves(grown, ready) if ready and (grown or self._offers) else ()
        self._sweep(ready)
        if not (loads or saves or behind):
            return self._nothing
        return ConnectorMeta(self._session, loads, saves, self._running.number, behind)

    @shielded(lambda: False)
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Leave the blocks that the last pass completed to the workers.

        Returns:
            Whether there are any: the engine then keeps the pages until `get_finished` names the request.
        """
        return self._finish(request, [list(cache_block_ids)])

    @shielded(lambda: False)
    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: Sequence[list[int]]
    ) -> bool:
        """Do the same with one list of pages for each layer group."""
        return self._finish(request, [list(pages) for pages in cache_block_ids_by_layer_group])

    @shielded(lambda: None)
    def cancel_load(self, request: Any, start: int, end: int) -> None:
        """Take back the part of a promise that the engine will not use (main).

        Args:
            request: The engine's request.
            start: First token of the prompt that is not going to be loaded.
            end: The token after the last one.
        """
        state, ready = self._requests.hear(request.request_id), self._runtime.ready
        if state is None or state.promise is None or ready is None:
            return
        state.promise.cut(start, end, state.tokens_per_block)
        if not state.promise.slots:
            self._drop_promise(state, ready)

    @shielded(lambda: None)
    def request_reset(self, request: Any) -> None:
        """Forget a request whose pages were taken away, and that will run again from its start (main)."""
        state, ready = self._requests.pop(request.request_id), self._runtime.ready
        if state is not None and ready is not None:
            self._drop_promise(state, ready)
            self._offers.drop(state)

    def stats(self) -> Mapping[str, int | float]:
        """Return this leader's counters, and the store's as `store_...`."""
        values = self._counters.snapshot()
        values["requests"] = len(self._requests)
        ready = self._runtime.ready
        if ready is not None:
            values.update({f"store_{name}": value for name, value in ready.store.stats().items()})
        return values

    def close(self) -> None:
        """Leave; the store closes when all of the engine's parts have left.

        The engine never calls this: without it the same happens when the leader is collected, or at exit.
        """
        self._runtime.leave(LEADER)

    def _meet(self, request: Any, ready: Ready) -> RequestState:
        """Return the state of a request, a new one if its identity is not what it was."""
        identity = Identity.of(request, self._adapters)
        note_unsupported(identity)
        state = self._requests.hear(request.request_id)
        if state is None or state.identity != identity:
            if state is not None:
                self._drop_promise(state, ready)
                self._offers.drop(state)
            size = ready.store.layout.tokens_per_block
            if self._hashes is None or self._hashes.tokens_per_block != size:
                self._hashes = HashCache(size)
            state = RequestState.start(identity, ready.namespace, size, self._hashes)
            self._requests.add(request.request_id, state)
        return state

    def _see_allocation(self, request: Any, pages: list[list[int]]) -> None:
        ready = self._runtime.ready
        if ready is None:
            return
        state = self._requests.hear(request.request_id)
        if state is None or state.promise is None:
            state = self._meet(request, ready)
        else:
            state.request = request
            if Identity.of(request, self._adapters) != state.identity:
                # The engine's Python object knows more than the C++ one that the promise was made to.
                state.identity = None
        state.see_allocation(pages)

    def _advance(self, scheduler_output: Any) -> tuple[list[RequestState], list[_Grown]]:
        """Take the coming pass into its requests' states.

        Returns:
            Those that something is promised to, and those with blocks that are whole after the pass and were
            not offered to the store.
        """
        promised: list[RequestState] = []
        grown: list[_Grown] = []
        # This runs for each request of each pass.
        states, now, turn = self._requests.states, self._requests.clock(), self._running.number
        for name in ("new_requests", "cached_requests"):
            is_new = name == "new_requests"
            for data in getattr(scheduler_output, name, None) or ():
                state = states.get(data.request_id)
                if state is None:
                    continue
                state.seen, state.turn = now, turn
                try:
                    valid = state.advance(data, is_new=True) if is_new else state.step(data)
                except Exception as error:
                    if state.promise:
                        raise
                    self._counters.add("errors_advance")
                    log_once(_log, "advance", "a request cannot be followed, it is not cached: %r", error)
                    self._requests.pop(data.request_id)
                    continue
                if state.promise is not None:
                    promised.append(state)
                blocks = valid // state.tokens_per_block
                if blocks > state.handled and state.identity is not None:
                    grown.append((data.request_id, state, blocks))
        return promised, grown

    def _keep_promise(self, state: RequestState, ready: Ready | None) -> Load | None:
        """Turn a promise into the order to load it; None if its lease is over and the engine took none of it.

        All of it is loaded where there are pages, even if the engine honours less: the rest of the pages are
        this request's own, and what is not honoured is computed later, over the same content. A group that
        has no page for a block (its window has passed it) needs no bytes there.

        Raises:
            BrokenPromise: The lease has run out and the blocks are gone, or the engine counts on blocks
                without telling their pages.
        """
        promise = state.promise
        if promise is None or ready is None:
            raise BrokenPromise("their store is closed")
        blocks = range(promise.first, promise.first + len(promise.slots))
        until = ready.store.hold(promise.lease)
        if not until:
            if state.computed <= promise.first * state.tokens_per_block:
                self._drop_promise(state, ready)
                return None
            promise = self._promise_again(state, promise, ready)
            until = ready.store.hold(promise.lease)
            if not until:
                raise BrokenPromise("their lease is over before it began")
        orders: list[tuple[int, Pages]] = []
        for block, slot in zip(blocks, promise.slots, strict=True):
            pages = state.pages_of(block, ready.groups)
            if pages is None:
                if block * state.tokens_per_block < state.computed:
                    raise BrokenPromise(f"the engine counts on block {block} and tells no page for it")
                break
            orders.append((slot, pages))
        self._counters.add("loaded_tokens", len(orders) * state.tokens_per_block)
        state.promise = state.request = None
        return Load(promise.lease, until, tuple(orders))

    def _promise_again(self, state: RequestState, promise: Promise, ready: Ready) -> Promise:
        """Find promised blocks whose lease has run out: the engine took a minute from lookup to load."""
        last = promise.first + len(promise.slots)
        match = ready.store.match(state.hash_through(last)[promise.first : last])
        if len(match.slots) < len(promise.slots):
            raise BrokenPromise("they lost their lease before the engine came for them, and are gone")
        return Promise(match.lease, promise.first, match.slots)

    @shielded(no_orders)
    def _saves(self, grown: Sequence[_Grown], ready: Ready) -> tuple[Save, ...]:
        saves: list[Save] = []
        for request_id, ordered in self._offers.orders(
            grown, ready.store, ready.groups, self._running.number
        ):
            self._running.note(request_id)
            saves += ordered
        return tuple(saves)

    def _finish(self, request: Any, pages: list[list[int]]) -> bool:
        state, ready = self._requests.pop(request.request_id), self._runtime.ready
        if state is None or ready is None:
            return False
        self._drop_promise(state, ready)
        tokens = token_array(request.get_tokens(0))
        if state.identity is None or not state.continues_in(tokens):
            self._offers.drop(state)
            return False
        state.tokens, state.pages = tokens, pages
        whole = state.settled(len(tokens)) // state.tokens_per_block
        saves = self._offers.last(request.request_id, state, whole, ready.store, ready.groups)
        if saves and not self._runtime.add_tail(request.request_id, saves):
            self._counters.add("tails_not_told")
            ready.store.abort([save.ticket for save in saves])
            return False
        # Without a tail the workers name the request when the saves that are under way have ended.
        return (ready.on_gpu and self._running.hold(request.request_id)) or bool(saves)

    @shielded(lambda: None)
    def _sweep(self, ready: Ready | None) -> None:
        for state in self._requests.pop_silent():
            self._counters.add("silent_requests")
            if ready is not None:
                self._drop_promise(state, ready)
        self._runtime.drop_old_tails()

    def _drop_promise(self, state: RequestState, ready: Ready) -> None:
        promise, state.promise, state.request = state.promise, None, None
        if promise is not None:
            ready.store.release(promise.lease)
