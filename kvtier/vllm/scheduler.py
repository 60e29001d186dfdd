"""The scheduler's half: promises blocks, and tells the workers what to load and what to save."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

import torch

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.config import load_config
from kvtier.connector.adapters import Adapters
from kvtier.connector.guard import no_orders, shielded
from kvtier.connector.hash_cache import HashCache
from kvtier.store.base import Match, Run, StoreClient
from kvtier.store.gate import ComputePace
from kvtier.vllm.identity import EngineFacts, config_path
from kvtier.vllm.meta import ConnectorMeta, Load, Save
from kvtier.vllm.request import Promise, RequestState
from kvtier.vllm.stores import open_part

_log = logging.getLogger(__name__)


_NAP_SECONDS = 0.005
"""How long a lookup may wait while nothing is computed."""


def _nothing() -> tuple[int | None, bool]:
    return 0, False


def _no_pages() -> set[int]:
    return set()


class SchedulerHalf:
    """Answers the scheduler from what lies verified in host memory; whatever goes wrong is a miss.

    Nothing that it is asked raises. Blocks that were promised and are lost before the workers are told are
    reported by these as not loaded.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        """Open the scheduler's part of the store.

        Raises:
            ConfigError: There is no configuration, or it is wrong.
            LayoutError: A KV cache that kvtier does not support.
        """
        config = load_config(config_path(vllm_config))
        self.engine = EngineFacts.read(vllm_config, kv_cache_config, config)
        self._shared = open_part(config, self.engine, torch.device("cpu"), self.engine.ranks)
        self._counters = Counters()
        self._size = self.engine.layout.tokens_per_block
        self._requests: dict[str, RequestState] = {}
        self._hashes = HashCache(self._size)
        self._adapters = Adapters()
        self._pace = ComputePace()
        # Tokens and beginning of the steps under way: the engine may order one before the last has ended.
        self._under_way: dict[int, tuple[int, float]] = {}
        self._ended = 0.0
        self._lookup_wait = config.lookup_wait
        self._step = 0
        self._idle = True
        self._settled = 0
        self._behind = 0
        self._tails: list[Save] = []
        self._era: str | None = None
        # MLA's latents are saved by one rank, which is not told of loads that fail on another: the pages of
        # loads, by step, until that step's end is heard of.
        self._one_saves = self.engine.latent and self.engine.ranks > 1
        self._unheard: dict[int, set[int]] = {}
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            _log.warning(
                "kv_load_failure_policy is fail: should blocks be lost between lookup and load, their"
                " requests fail; with recompute they are computed"
            )

    @shielded(_nothing)
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Promise the blocks that follow the local match, as far as they can be loaded at once.

        Args:
            request: The engine's request.
            num_computed_tokens: Tokens matched in the engine's pool.

        Returns:
            Tokens that can be loaded beyond them, a multiple of the block size that leaves at least one
            token to be computed; None to be asked again, while it pays to wait for blocks that are on their
            way. And False: the load happens in front of the next pass.
        """
        store = self._store()
        state = self._meet(request)
        if store is None:
            return 0, False
        self._drop_promise(state, store)
        size = self._size
        unread = getattr(request, "skip_reading_prefix_cache", False)
        if state.identity is None or unread or num_computed_tokens % size:
            return 0, False
        first, last = num_computed_tokens // size, (state.see_tokens() - 1) // size
        if first >= last:
            return 0, False
        match = self._match(state, store, state.hash_through(last)[first:last])
        if match is None:
            return None, False
        self._counters.add("looked_up_tokens", (last - first) * size)
        blocks = len(match.slots)
        if blocks == 0:
            return 0, False
        # Before the engine counts on it: what it does about loads that fail is not always right.
        # Nor is a lease promised that has an end, as while the agent does not answer: its copies would have
        # to be waited for.
        if store.hold(match.lease) != math.inf:
            store.release(match.lease)
            return 0, False
        state.promise = Promise(match.lease, first, match.slots)
        for tier, count in state.origins(match.sources).items():
            self._counters.add(f"promised_tokens_{tier}", count * size)
        return blocks * size, False

    @shielded(lambda: None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note how much of a promise the engine takes, and the pages that it has for it."""
        state = self._meet(request)
        state.pages = list(blocks.get_block_ids()[0])
        promise = state.promise
        if promise is None:
            return
        taken = num_external_tokens // self._size
        if taken <= 0:
            self._drop_promise(state, self._store())
        else:
            promise.taken = True
            promise.slots = promise.slots[:taken]

    def build_connector_meta(self, scheduler_output: Any) -> ConnectorMeta:
        """Give the orders for the coming step: what is promised is loaded, whole blocks are saved."""
        self._step += 1
        store = self._store()
        loads = tuple(
            self._keep_promise(state, store)
            for state in self._requests.values()
            if state.promise is not None and state.promise.taken
        )
        if loads and self._one_saves:
            self._unheard[self._step] = {page for load in loads for page in load.pages}
        tails, self._tails = tuple(self._tails), []
        for request_id in scheduler_output.preempted_req_ids or ():
            self._free_pages(self._requests.get(request_id))
        behind, self._behind = self._behind, 0
        self._idle = not scheduler_output.total_num_scheduled_tokens
        saves = self._saves(scheduler_output, store)
        return ConnectorMeta(self._step, self._settled, behind, loads, tails, saves)

    @shielded(lambda: None)
    def request_finished(self, request: Any, block_ids: Sequence[int]) -> None:
        """Order those blocks to be saved whose tokens were not known in the step that completed them."""
        state = self._requests.pop(request.request_id, None)
        store = self._store()
        if state is None or store is None:
            return
        self._drop_promise(state, store)
        self._free_pages(state)
        state.pages = list(block_ids)
        self._tails += self._offer([state], store)

    @shielded(_no_pages)
    def update_connector_output(self, output: Any) -> set[int]:
        """Hear that a step has ended, and of steps whose loads failed.

        Returns:
            Pages that hold nothing good, since they were not loaded or stand behind such: the engine must
            not find them in its own prefix cache.
        """
        told = getattr(output, "kv_connector_worker_meta", None)
        if told is None:
            return set()
        self._see_end(told.step)
        if told.failed <= self._settled:
            return set()
        self._settled = told.failed
        self._counters.add("failed_steps")
        store = self._store()
        if store is not None:
            # Of requests that failed with that step.
            store.abort([save.ticket for save in self._tails])
        self._tails.clear()
        spoilt: set[int] = set()
        for state in self._requests.values():
            # Nothing of the step was saved.
            state.valid = state.handled = 0
            missing = [place for place, page in enumerate(state.pages) if page in output.invalid_block_ids]
            if missing:
                # One of those that share the page computes it again, and others may be ahead of it.
                state.identity = None
                spoilt.update(state.pages[missing[0] :])
        return spoilt

    def reset_cache(self) -> bool:
        """Forget everything, as far as this engine goes: it may have other weights from now on.

        Requests that go on are not looked up and not saved any more: what they are called and what lies in
        their pages may be of the time before. And an engine that goes to sleep loses the pages themselves.
        """
        self._era = secrets.token_hex(8)
        store = self._store()
        if store is not None:
            store.abort([save.ticket for save in self._tails])
        self._tails.clear()
        for request_id, state in list(self._requests.items()):
            state.identity = None
            if not state.pages:
                # It has nothing of that time.
                self._drop_promise(state, store)
                del self._requests[request_id]
        return True

    def close(self) -> None:
        """Leave the store."""
        store = self._store()
        if store is not None:
            for state in self._requests.values():
                self._drop_promise(state, store)
            store.abort([save.ticket for save in self._tails])
        self._requests.clear()
        self._tails.clear()
        self._shared = None

    def take_counts(self) -> dict[str, int | float]:
        """Return this half's counters."""
        return self._counters.snapshot()

    def store_stats(self) -> dict[str, int | float]:
        """Return what the store counts."""
        store = self._store()
        return dict(store.stats()) if store is not None else {}

    def _store(self) -> StoreClient | None:
        return self._shared.store if self._shared is not None else None

    def _meet(self, request: Any) -> RequestState:
        state = self._requests.get(request.request_id)
        if state is None or state.request is not request:
            state = RequestState.start(
                request, self._adapters, self.engine.namespace.id, self._size, self._hashes, self._era
            )
            self._requests[request.request_id] = state
        return state

    def _match(self, state: RequestState, store: StoreClient, hashes: Sequence[bytes]) -> Match | None:
        """Look blocks up; None while it pays to wait for some: the scheduler's thread does not."""
        now = time.monotonic()
        if state.deadline is None:
            patience, wait, state.expected = self._lookup_wait, 0.0, {}
        else:
            patience = max(0.0, state.deadline - now)
            # An engine with nothing else to do would only go round and round.
            wait = min(_NAP_SECONDS, patience) if self._idle else 0.0
        alone = len(hashes) if len(self._requests) == 1 else 0
        match = store.match(hashes, wait, self._pace.block_cost(self._size, alone), patience)
        if match.ask_again:
            if state.deadline is None:
                state.deadline, state.expected = now + match.ask_again, match.sources
            return None
        state.deadline = None
        return match

    def _free_pages(self, state: RequestState | None) -> None:
        """Note that somebody else may get a request's pages in the coming step."""
        if state is not None:
            self._behind = max(self._behind, state.saved)

    def _keep_promise(self, state: RequestState, store: StoreClient | None) -> Load:
        """Turn a promise into the order to load it, or to report that it cannot be."""
        promise, state.promise = state.promise, None
        assert promise is not None
        pages = tuple(state.pages[promise.first : promise.first + len(promise.slots)])
        try:
            if store is not None and len(pages) == len(promise.slots):
                self._counters.add("loaded_tokens", len(pages) * self._size)
                if promise.first <= state.handled:
                    # They lie in the arena: the agent need not be asked whether it wants them.
                    state.handled = max(state.handled, promise.first + len(pages))
                # The workers hold it from here on.
                store.release(promise.lease, self.engine.ranks)
                return Load(promise.lease, promise.slots, pages)
        except Exception as error:  # noqa: BLE001 - the engine counts on an answer
            log_once(_log, "release", "promised blocks cannot be loaded: %r", error)
        self._counters.add("lost_promises")
        if store is not None:
            # Nobody else is going to: the workers are told nothing of it.
            store.release(promise.lease)
        return Load(0, (), pages)

    @shielded(no_orders)
    def _saves(self, scheduler_output: Any, store: StoreClient | None) -> tuple[Save, ...]:
        if scheduler_output.total_num_scheduled_tokens:
            tokens = int(scheduler_output.total_num_scheduled_tokens)
            self._under_way[self._step] = (tokens, time.monotonic())
        try:
            states = self._advance(scheduler_output)
            return tuple(self._offer(states, store)) if store is not None else ()
        except Exception:
            # Nobody knows any more which pages belong to whom.
            for state in self._requests.values():
                state.identity = None
            raise

    def _see_end(self, step: int) -> None:
        """Learn from a step's end how fast the engine computes."""
        tokens, begun = self._under_way.get(step, (0, 0.0))
        for steps in (self._under_way, self._unheard):
            for ended in [known for known in steps if known <= step]:
                del steps[ended]
        if tokens:
            now = time.monotonic()
            self._pace.begins(tokens, max(begun, self._ended))
            self._pace.begins(0, now)
            self._ended = now

    def _advance(self, scheduler_output: Any) -> list[RequestState]:
        """Take the coming step into its requests' states, and return these."""
        drafts = scheduler_output.scheduled_spec_decode_tokens
        scheduled = scheduler_output.num_scheduled_tokens
        states = []
        for data in scheduler_output.scheduled_new_reqs:
            state = self._requests.get(data.req_id)
            if state is not None:
                state.pages = list(data.block_ids[0])
                state.advance(data.num_computed_tokens, scheduled[data.req_id], drafts.get(data.req_id))
                states.append(state)
        cached = scheduler_output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            state = self._requests.get(request_id)
            if state is None:
                continue
            new = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                state.pages = list(new[0]) if new else []
                state.handled = 0
            elif new:
                state.pages.extend(new[0])
            state.advance(cached.num_computed_tokens[index], scheduled[request_id], drafts.get(request_id))
            states.append(state)
        return states

    def _offer(self, states: Sequence[RequestState], store: StoreClient) -> list[Save]:
        """Reserve slots for those blocks of requests that were not offered yet.

        Blocks that were matched or loaded are offered too, once: what fell out of the arena comes back.
        """
        runs: list[Run] = []
        pages: list[list[int]] = []
        for state in states:
            first, last = state.handled, state.savable()
            if state.identity is None or last <= first:
                continue
            if any(not loaded.isdisjoint(state.pages) for loaded in self._unheard.values()):
                # Later, if the load has not failed anywhere.
                continue
            state.handled, state.saved = last, self._step
            hashes = state.hash_through(last)[first:last]
            runs.append(Run(state.hash_before(first), first, hashes))
            pages.append(state.pages[first:last])
        # All at once: with an agent the engine's thread waits for one answer, not for one after the other.
        reservations = store.reserve_soon(runs) if runs else []
        return [
            Save(ticket, page)
            for reservation, places in zip(reservations, pages, strict=True)
            for ticket, page in zip(reservation.take(wait=True) or (), places, strict=False)
            if ticket is not None
        ]

    def _drop_promise(self, state: RequestState, store: StoreClient | None) -> None:
        promise, state.promise = state.promise, None
        if promise is not None and store is not None:
            store.release(promise.lease)
