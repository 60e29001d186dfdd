"""Gives requests their pages: local matches, the connector's offers, allocation, reuse."""

from __future__ import annotations

from kvtier.engine.config import EngineConfig
from kvtier.engine.connector import Connector
from kvtier.engine.memory import KVMemory
from kvtier.engine.pool import NO_PAGE, BlockPool, OutOfPages
from kvtier.engine.sequence import Sequence, State
from kvtier.engine.versions import Reporter


class CacheManager:
    """The only one that changes which blocks a request holds."""

    def __init__(
        self, config: EngineConfig, memory: KVMemory, connector: Connector | None, reporter: Reporter
    ) -> None:
        self._config = config
        self._memory = memory
        self._connector = connector
        self._reporter = reporter
        self._tokens_per_block = config.tokens_per_block
        self.pool = BlockPool(memory.num_pages)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks hold `tokens` tokens."""
        return -(-tokens // self._tokens_per_block)

    def chunk_end(self, position: int, budget: int, prompt_len: int) -> int:
        """Return where a chunk from `position` ends: at the prompt's end, or at a block boundary."""
        end = position + budget
        if end >= prompt_len:
            return prompt_len
        return max(position, end // self._tokens_per_block * self._tokens_per_block)

    def admit(self, sequence: Sequence, budget: int) -> bool:
        """Match, ask the connector, allocate and tell it, for a request's first chunk.

        Returns:
            False when the pages are not there; then nothing was asked and nothing is held.
        """
        sequence.reset()
        prompt = sequence.prompt_len
        hits = []
        if self._config.block_reuse:
            most = (prompt - 1) // self._tokens_per_block
            hits = self.pool.match(sequence.keys(most, self._tokens_per_block))
        local = len(hits) * self._tokens_per_block
        chunk_end = self.chunk_end(local, budget, prompt)
        needed = self.blocks_for(chunk_end if self._config.by_group else prompt) - len(hits)
        if needed > self.pool.available:
            self.pool.release(hits)
            return False
        sequence.blocks = hits
        sequence.state = State.CONTEXT
        external, asynchronous = self._ask(sequence, local, chunk_end)
        sequence.external = external
        sequence.position = local + external
        self._allocate(sequence, needed)
        if not self._config.by_group:
            chunk_end = self.chunk_end(sequence.position, budget, prompt)
        sequence.chunk = chunk_end - sequence.position
        sequence.metrics.tokens_local += local
        sequence.metrics.tokens_external += external
        if self._connector is not None:
            self._connector.allocated(sequence)
        if asynchronous:
            sequence.state = State.LOADING
        return True

    def _ask(self, sequence: Sequence, local: int, chunk_end: int) -> tuple[int, bool]:
        if self._connector is None or not self._config.block_reuse:
            return 0, False
        offered, asynchronous = self._connector.query(sequence, local)
        taken = offered
        if self._config.by_group:
            room = (chunk_end - 1) // self._tokens_per_block * self._tokens_per_block - local
            taken = min(offered, room)
            if self._config.honour_blocks is not None:
                taken = min(taken, self._config.honour_blocks * self._tokens_per_block)
        self._connector.cancel(sequence, local + taken, local + offered)
        self._connector.accept(sequence, taken, asynchronous)
        self._reporter.matched(sequence, taken)
        return taken, asynchronous

    def _allocate(self, sequence: Sequence, count: int) -> None:
        for group in range(sequence.num_groups):
            sequence.passed[group] = self._passed(group, sequence.position)
        for _ in range(count):
            index = len(sequence.blocks)
            without = [g for g, passed in enumerate(sequence.passed) if index < passed]
            block = self.pool.allocate(without)
            block.fresh = index * self._tokens_per_block >= sequence.position
            sequence.blocks.append(block)

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Let a request hold room for `tokens` tokens; False when pages run out."""
        try:
            while len(sequence.blocks) * self._tokens_per_block < tokens:
                sequence.blocks.append(self.pool.allocate())
        except OutOfPages:
            return False
        return True

    def pass_window(self, sequence: Sequence, position: int) -> None:
        """Give back pages that no query from `position` on attends to."""
        for group in range(sequence.num_groups):
            passed = self._passed(group, position)
            for index in range(sequence.passed[group], passed):
                self.pool.drop_page(sequence.blocks[index], group)
            sequence.passed[group] = max(passed, sequence.passed[group])

    def _passed(self, group: int, position: int) -> int:
        window = self._memory.windows[group]
        return 0 if window is None else max(0, (position - window + 1) // self._tokens_per_block)

    def take_fresh(self, sequence: Sequence, tokens: int) -> list[tuple[int, int]]:
        """Return group and page of a request's pages that hold nothing valid yet, once.

        The pages up to `tokens` are about to be computed. Recycled memory holds garbage there, and the
        engine puts some, so that reading it shows.
        """
        fresh = []
        for block in sequence.blocks[: self.blocks_for(tokens)]:
            if block.fresh:
                fresh += [(group, page) for group, page in enumerate(block.pages) if page != NO_PAGE]
            block.fresh = False
        return fresh if self._config.poison else []

    def commit(self, sequence: Sequence) -> None:
        """Offer a request's valid full blocks for reuse."""
        if self._config.block_reuse:
            full = min(sequence.valid, len(sequence.tokens)) // self._tokens_per_block
            for block, key in zip(sequence.blocks, sequence.keys(full, self._tokens_per_block), strict=False):
                self.pool.register(block, key)

    def pause(self, sequence: Sequence) -> None:
        """Take the blocks of a request away that will run again from its start."""
        self.commit(sequence)
        self.release(sequence)
        if self._connector is not None:
            self._connector.paused(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a request's blocks away; what was committed is kept for reuse until its pages are needed."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
