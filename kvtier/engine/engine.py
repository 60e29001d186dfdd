"""The loop: schedule, let the connector load, compute, sample, finish, and poll the connector."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from typing import Any

from kvtier.engine.cache import CacheManager
from kvtier.engine.config import EngineConfig, Finished, Metrics, Request
from kvtier.engine.connector import Connector, make_llm_args
from kvtier.engine.group import RankLost
from kvtier.engine.model import Model, Span
from kvtier.engine.rank import Work
from kvtier.engine.ranks import Ranks
from kvtier.engine.scheduler import Batch, Scheduler
from kvtier.engine.sequence import Sequence, State
from kvtier.engine.versions import Reporter

logger = logging.getLogger(__name__)

IDLE_SLEEP_SECONDS = 0.0005

Launched = list[tuple[Sequence, "int | None"]]


class Engine:
    """A small paged engine that calls a connector exactly as the real one does.

    One `step` is one iteration. What upstream does to a connector that breaks a rule happens here, too: an
    exception in a leader method, in `start_load_kv` or in `get_finished` comes out of `step` and the engine
    is dead; one in a layer hook or `wait_for_save` fails every active request.

    Attributes:
        ranks: Who computes.
        memory: Rank 0's KV pool.
        connector: The connector, or None.
        scheduler: Who waits, who runs.
        cache: Who holds which pages.
        iterations: Iterations so far.
        forwards: Iterations in which something was computed.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        leader_class: type | None = None,
        worker_class: type | None = None,
        llm_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Allocate the pool, construct the connector, warm up, register.

        Args:
            model: What computes.
            config: Settings.
            leader_class: The connector's leader; constructed as `leader_class(llm_args)`.
            worker_class: The connector's worker; both or neither.
            llm_args: Attributes of the constructors' argument to set or replace.
        """
        if (leader_class is None) != (worker_class is None):
            raise ValueError("a connector has a leader class and a worker class")
        self.model = model
        self.config = config = config or EngineConfig()
        self.connector: Connector | None = None
        arguments = [
            make_llm_args(model, config, llm_args, rank) for rank in range(config.tensor_parallel_size)
        ]
        self.ranks = Ranks(model, config, worker_class, arguments)
        try:
            if leader_class is not None and worker_class is not None:
                self.connector = Connector(leader_class, worker_class, arguments[0], config, self.ranks)
            self.ranks.open(self.connector.worker if self.connector is not None else None)
            if self.connector is not None:
                self.connector.wait_for_initialization()
        except BaseException:
            self.ranks.close()
            raise
        self.memory = self.ranks.here.memory
        self._reporter = Reporter(config.version, config.tokens_per_block, config.by_group)
        self.cache = CacheManager(config, self.memory, self.connector, self._reporter)
        self.scheduler = Scheduler(config, self.cache, self._reporter)
        self._ids = itertools.count(1)
        self._sequences: dict[int, Sequence] = {}
        self._cancelled: set[int] = set()
        self._previous: Launched = []
        self._events: list[Finished] = []
        self._dead: str | None = None
        self.iterations = self.forwards = 0

    def submit(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            ValueError: It can never fit into the pool.
        """
        sequence = Sequence(next(self._ids), request, len(self.memory.groups))
        self.scheduler.add(sequence)
        self._sequences[sequence.id] = sequence
        return sequence.id

    def cancel(self, request_id: int) -> None:
        """Stop a request in the next iteration; the connector is not told. Finished ones are left alone."""
        if self._sequences[request_id].state is not State.ENDED:
            self._cancelled.add(request_id)

    def output(self, request_id: int) -> list[int]:
        """Return the tokens generated so far."""
        return self._sequences[request_id].generated

    def metrics(self, request_id: int) -> Metrics:
        """Return what a request cost so far."""
        return self._sequences[request_id].metrics

    @property
    def busy(self) -> bool:
        """Whether any request is not over."""
        return bool(self.scheduler.active or self.scheduler.waiting or self._previous)

    def run(self, timeout: float = 600.0) -> list[Finished]:
        """Step until every request is over.

        Raises:
            TimeoutError: That took more than `timeout` seconds: a load never ends, or pages never come back.
        """
        events: list[Finished] = []
        deadline = time.monotonic() + timeout
        while self.busy:
            if time.monotonic() > deadline:
                raise TimeoutError(f"still busy after {timeout} s: {self._describe()}")
            events += self._step_or_sleep()
        return events

    def idle(self, iterations: int = 1) -> list[Finished]:
        """Run iterations whether or not there is work, so that `get_finished` is driven."""
        events: list[Finished] = []
        for _ in range(iterations):
            events += self._step_or_sleep()
        return events

    def settle(self, timeout: float = 30.0) -> list[Finished]:
        """Step until nothing is busy and no pages are held for transfers.

        Raises:
            TimeoutError: See `run`.
        """
        events = self.run(timeout)
        deadline = time.monotonic() + timeout
        while self.scheduler.held:
            if time.monotonic() > deadline:
                raise TimeoutError(f"pages still held after {timeout} s: {self._describe()}")
            events += self._step_or_sleep()
        return events

    def close(self) -> None:
        """Refuse further steps, and end the other ranks' processes.

        No release tells a connector that the engine ends, nor is it told here.
        """
        self._dead = "the engine is closed"
        self.ranks.close()

    def step(self) -> list[Finished]:
        """Run one iteration and return the requests that ended in it.

        Raises:
            RuntimeError: The engine is closed, or died of an earlier exception.
        """
        if self._dead is not None:
            raise RuntimeError(self._dead)
        try:
            self._iterate()
        except BaseException as error:
            self._dead = f"the engine died: {type(error).__name__}: {error}"
            raise
        events, self._events = self._events, []
        return events

    def _step_or_sleep(self) -> list[Finished]:
        forwards = self.forwards
        events = self.step()
        if self.forwards == forwards and not events:
            time.sleep(IDLE_SLEEP_SECONDS)
        return events

    def _iterate(self) -> None:
        self.iterations += 1
        batch = self.scheduler.schedule()
        if batch:
            running = batch.without_loading()
            if self.connector is not None:
                output = self._reporter.report(running.context, running.generation)
                self.connector.begin_batch(output)
            batch = running
        launched = self._forward(batch) if batch else []
        if self.config.overlap:
            launched, self._previous = self._previous, launched
        self._process(launched)
        self._handle_cancelled()
        if self.connector is not None:
            self._handle_transfers(self.connector)

    def _forward(self, batch: Batch) -> Launched:
        self.forwards += 1
        garbage: list[tuple[int, int]] = []
        spans = []
        for sequence in batch.context:
            spans.append(self._span(sequence, sequence.position, sequence.position + sequence.chunk, garbage))
        for sequence in batch.generation:
            last = len(sequence.device_tokens)
            spans.append(self._span(sequence, last - 1, last, garbage))
        hooks = not (self.config.graph_decode and not batch.context)
        try:
            tokens = self.ranks.forward(Work(spans, garbage, hooks))
        except RankLost:
            raise
        except Exception as error:
            # Upstream answers every active request with an error and goes on.
            logger.exception("the forward pass failed")
            self._fail_active(error)
            return []
        launched: Launched = []
        for sequence, span, token in zip([*batch.context, *batch.generation], spans, tokens, strict=True):
            sequence.valid = span.end
            if sequence.state is State.CONTEXT:
                sequence.position = span.end
                sequence.metrics.tokens_computed += sequence.chunk
                if token is not None:
                    sequence.state = State.GENERATION
            if token is not None:
                sequence.device_tokens.append(token)
            launched.append((sequence, token))
        return launched

    def _span(self, sequence: Sequence, start: int, end: int, garbage: list[tuple[int, int]]) -> Span:
        garbage += self.cache.take_fresh(sequence, end)
        count = self.cache.blocks_for(end)
        pages = [sequence.pages(group)[:count] for group in range(sequence.num_groups)]
        sample = end >= sequence.prompt_len
        return Span(sequence.device_tokens, start, end, pages, sample, sequence.request)

    def _process(self, launched: Launched) -> None:
        """Look at the tokens of a forward: append them, end requests, offer prompts for reuse."""
        ended = []
        for sequence, token in launched:
            if token is None or sequence.state is State.ENDED:
                continue
            sequence.tokens.append(token)
            if len(sequence.generated) == 1:
                sequence.metrics.ttft_s = time.perf_counter() - sequence.submitted
            self.cache.commit(sequence)
            if token == sequence.request.eos_id:
                ended.append((sequence, "eos"))
            elif len(sequence.generated) >= sequence.request.max_new_tokens:
                ended.append((sequence, "length"))
        for sequence, reason in ended:
            if self.connector is not None and self.connector.finished(sequence):
                self.scheduler.hold(sequence)
            self._end(sequence, reason)

    def _handle_cancelled(self) -> None:
        for request_id in self._cancelled:
            sequence = self._sequences[request_id]
            if sequence.state is State.ENDED:
                continue
            self.cache.commit(sequence)
            self._end_early(sequence, "cancelled")
        self._cancelled.clear()

    def _handle_transfers(self, connector: Connector) -> None:
        saved, loaded = connector.poll()
        for sequence in loaded:
            if sequence.state is State.LOADING:
                sequence.state = State.CONTEXT
        for sequence in (*saved, *loaded):
            if sequence.id in self.scheduler.held and not connector.transferring(sequence):
                del self.scheduler.held[sequence.id]
                self.cache.release(sequence)

    def _end(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        self.scheduler.remove(sequence)
        self._reporter.forget(sequence)
        sequence.state = State.ENDED
        if sequence.id not in self.scheduler.held:
            self.cache.release(sequence)
        self._events.append(Finished(sequence.id, reason, tuple(sequence.generated), error))

    def _fail_active(self, error: Exception) -> None:
        for sequence in list(self.scheduler.active):
            self._end_early(sequence, "failed", error)
        self._previous = []

    def _end_early(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        if self.connector is not None:
            announce = self.config.announce_cancelled and bool(sequence.blocks)
            saving = announce and self.connector.finished(sequence)
            self.connector.forget(sequence)
            # Up to 1.3 the pages are freed although a load may still be writing to them.
            loading = self.config.version == "main" and self.connector.transferring(sequence)
            if saving or loading:
                self.scheduler.hold(sequence)
        self._end(sequence, reason, error)

    def _describe(self) -> str:
        states = {s.id: s.state.value for s in [*self.scheduler.active, *self.scheduler.waiting]}
        available = self.cache.pool.available
        return f"requests {states}, held {sorted(self.scheduler.held)}, {available} blocks available"
