"""Chooses what runs in the next forward."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from kvtier.engine.cache import CacheManager
from kvtier.engine.config import EngineConfig
from kvtier.engine.sequence import Sequence, State
from kvtier.engine.versions import Reporter

UNLIMITED = 1 << 62


@dataclass(slots=True)
class Batch:
    """Requests of one forward."""

    context: list[Sequence] = field(default_factory=list)
    generation: list[Sequence] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.context or self.generation)

    def without_loading(self) -> Batch:
        """Return the batch less the requests whose KV is being loaded asynchronously."""
        return Batch([s for s in self.context if s.state is not State.LOADING], self.generation)


class Scheduler:
    """First come, first served; generation before prefill.

    The first KV cache manager's way: a request is admitted when everything it may ever need is free, and is
    never paused. The second's (`by_group`): it is admitted when its first chunk fits, and the
    youngest requests are paused when an older one needs their pages.

    Attributes:
        waiting: Requests without pages.
        active: Requests with pages that are not finished, in order of admission.
        held: Requests that are over but whose pages a transfer still uses.
        pauses: How often a request was paused.
    """

    def __init__(self, config: EngineConfig, cache: CacheManager, reporter: Reporter) -> None:
        self._config = config
        self._cache = cache
        self._reporter = reporter
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self.held: dict[int, Sequence] = {}
        self.pauses = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            ValueError: It could never fit into the pool, or has no tokens.
        """
        if not sequence.request.prompt or sequence.request.max_new_tokens < 1:
            raise ValueError("a request needs a prompt and at least one new token")
        if self._blocks_to_the_end(sequence) > self._cache.pool.num_blocks:
            raise ValueError(
                f"request {sequence.id} needs {self._blocks_to_the_end(sequence)} blocks, "
                f"the pool has {self._cache.pool.num_blocks}"
            )
        self.waiting.append(sequence)

    def schedule(self) -> Batch:
        """Choose a batch, and give its requests the pages that this forward needs."""
        batch = Batch()
        budget = self._config.max_tokens_per_step or UNLIMITED
        pauses = self.pauses
        for sequence in list(self.active):
            if sequence.state is not State.GENERATION:
                continue
            if self._make_room(sequence, len(sequence.device_tokens), batch):
                self._cache.pass_window(sequence, len(sequence.device_tokens) - 1)
                batch.generation.append(sequence)
                budget -= 1
        for sequence in list(self.active):
            if sequence.state is not State.CONTEXT:
                continue
            end = self._cache.chunk_end(sequence.position, budget, sequence.prompt_len)
            if end > sequence.position and self._make_room(sequence, end, batch):
                self._cache.pass_window(sequence, sequence.position)
                sequence.chunk = end - sequence.position
                batch.context.append(sequence)
                budget -= sequence.chunk
        if self.pauses == pauses:
            self._admit(batch, budget)
        return batch

    def _admit(self, batch: Batch, budget: int) -> None:
        while self.waiting and len(self.active) < self._config.max_batch_size:
            sequence = self.waiting[0]
            if self._cache.chunk_end(0, budget, len(sequence.tokens)) == 0:
                return
            if not self._config.by_group and not self._fits_to_the_end(sequence):
                return
            if not self._cache.admit(sequence, budget):
                return
            self.waiting.popleft()
            self.active.append(sequence)
            batch.context.append(sequence)
            budget -= sequence.chunk

    def pause(self, sequence: Sequence) -> None:
        """Take a running request's pages away and replay it as a new one later."""
        self.pauses += 1
        self._cache.pause(sequence)
        self._reporter.forget(sequence)
        sequence.state = State.WAITING
        self.active.remove(sequence)
        self.waiting.appendleft(sequence)

    def hold(self, sequence: Sequence) -> None:
        """Keep the pages of a request that is over until its transfer is."""
        self.held[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a request that is over; its pages are the caller's matter."""
        if sequence in self.active:
            self.active.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)

    def _make_room(self, sequence: Sequence, tokens: int, batch: Batch) -> bool:
        """Let a request grow, pausing the youngest that may be paused: not loading, not in the batch yet."""
        while not self._cache.grow(sequence, tokens):
            younger = self.active[self.active.index(sequence) + 1 :]
            victims = [
                other
                for other in younger
                if other.state in (State.CONTEXT, State.GENERATION) and other not in batch.generation
            ]
            if not victims:
                return False
            self.pause(victims[-1])
        return True

    def _blocks_to_the_end(self, sequence: Sequence) -> int:
        return self._cache.blocks_for(len(sequence.request.prompt) + sequence.request.max_new_tokens)

    def _fits_to_the_end(self, sequence: Sequence) -> bool:
        pledged = sum(self._blocks_to_the_end(other) for other in self.active)
        held = sum(len(other.blocks) for other in self.held.values())
        return pledged + held + self._blocks_to_the_end(sequence) <= self._cache.pool.num_blocks
