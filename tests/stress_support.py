"""An executor that reuses pages as fast as it can, with every byte of every block known."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from kvtier.codec import PlaneSlots
from kvtier.connector.transfer import Blocks, CudaTransfers, Done, Mover
from kvtier.store import TieredStore, ticket_slot
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from kvtier.trtllm.pool import Pool
from tests.trtllm_support import SIZE, FakeRequest, Rig, llm_args

PAGES = 48
SLOTS = 32
LAYERS = 2
GARBAGE = -1

RANDOM_BITS = 0x83FF_83FF_83FF_83FF
STEADY_BITS = 0x3C00_3C00_3C00_3C00
"""Four bfloat16 numbers: signs, mantissas and three bits of the exponents differ, as planes can hold them."""


def stress_seeds(usual: list[int]) -> list[int]:
    """Return the seeds that KVTIER_STRESS_SEEDS names, such as "7", "7,8,21" or "100-139"; else the usual."""
    asked = os.environ.get("KVTIER_STRESS_SEEDS", "")
    spans = [part.partition("-") for part in asked.replace(" ", "").split(",") if part]
    return [seed for low, _, high in spans for seed in range(int(low), int(high or low) + 1)] or usual


def seeds_until_wrong(run: Callable[[int], int], first: int, most: int = 40) -> int:
    """Return how many seeds, from the first on, it takes until `run` finds something wrong; 0: none does."""
    return next((count for count in range(1, most + 1) if run(first + count - 1)), 0)


class Deaf:
    """A stream that waits for nothing."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


class LoadsNotAwaited(CudaTransfers):
    """The forward pass begins before the loads have arrived."""

    def load(self, stream: Any, blocks: Blocks, done: Done) -> None:
        super().load(Deaf(stream), blocks, done)


class LoadsTooEarly(CudaTransfers):
    """Loads write to pages that the pass before still computes with."""

    def __init__(self, mover: Mover, loads: Any, saves: Any) -> None:
        super().__init__(mover, Deaf(loads), saves)


class SavesTooEarly(CudaTransfers):
    """Saves do not wait for the forward pass."""

    def __init__(self, mover: Mover, loads: Any, saves: Any) -> None:
        super().__init__(mover, loads, Deaf(saves))


class PassesNotOrdered(CudaTransfers):
    """The next pass does not wait for the saves of pages that it may write to."""

    def order(self, stream: Any, behind: int) -> None: ...


class LeasesReleasedEarly(CudaTransfers):
    """Slots are given up when their loads are enqueued."""

    def load(self, stream: Any, blocks: Blocks, done: Done) -> None:
        super().load(stream, blocks, lambda made: None)
        done(True)


class CommittedEarly(CudaTransfers):
    """Blocks are told to be in place when their saves are enqueued."""

    def save(self, stream: Any, blocks: Blocks, done: Done, number: int) -> None:
        super().save(stream, blocks, lambda made: None, number)
        done(True)


class TailsReportedEarly(CudaTransfers):
    """The pages of ended requests are let go of although their saves are under way."""

    def after_saves(self, done: Callable[[], None]) -> None:
        done()


MUTILATED = [
    LoadsNotAwaited,
    LoadsTooEarly,
    SavesTooEarly,
    PassesNotOrdered,
    LeasesReleasedEarly,
    CommittedEarly,
    TailsReportedEarly,
]


@dataclass(eq=False)
class Running:
    """A request on its way.

    Attributes:
        request: What the leader sees.
        pages: Its pages.
        position: Leading tokens whose KV is in place after the passes so far.
        told: Tokens and pages that the leader was told of.
        ends: Tokens at which it ends.
    """

    request: FakeRequest
    pages: list[int]
    position: int
    ends: int
    told: tuple[int, int] = (0, 0)


@dataclass
class Counts:
    loaded: int = 0
    cancelled: int = 0
    held: int = 0
    ordered: int = 0
    failed: int = 0
    checks: list[torch.Tensor] = field(default_factory=list)


class Stress:
    """A leader and a worker under an executor that admits, cancels, ends and pads at random.

    Args:
        gpu: Streams, kernels and sleeps: `stream`, `run`, `sleep`, `synchronize`; `engine` is the stream that
            the engine works on.
        pool: `[PAGES, layers, 2, row]` on it.
        transfers: Makes what moves the blocks of the pool.
        rng: All chance.
    """

    def __init__(
        self, gpu: Any, pool: torch.Tensor, transfers: Callable[[Pool], CudaTransfers], rng: random.Random
    ) -> None:
        self._gpu, self._rng = gpu, rng
        arguments = llm_args()
        leader, worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
        worker.register_kv_caches(pool)
        self.rig = Rig(leader, worker, pool)
        runtime = leader._runtime
        runtime.ready = replace(runtime.ready, on_gpu=True)
        worker._transfers = transfers(worker._pool)
        order = worker._transfers.order

        def counted(stream: Any, behind: int) -> None:
            self.counts.ordered += bool(behind)
            order(stream, behind)

        worker._transfers.order = counted
        self._engine = gpu.engine
        self._words = pool.view(PAGES, LAYERS, -1).view(torch.int64)
        base = np.arange(self._words[0].numel(), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        base = base & np.uint64(RANDOM_BITS) | np.uint64(STEADY_BITS)
        self._base_host = torch.from_numpy(base.view(np.int64).reshape(LAYERS, -1).copy())
        self._base = self._base_host.to(pool.device)
        self._documents = [[rng.randrange(1000) for _ in range(12 * SIZE)] for _ in range(3)]
        self._free = list(range(PAGES))
        self._held: dict[int, list[int]] = {}
        self._finished: list[int] = []
        self._active: list[Running] = []
        self._ids = 0
        self._bad = torch.zeros((), dtype=torch.int64, device=pool.device)
        self.counts = Counts()
        self.prompts: list[list[int]] = []

    def run(self, iterations: int) -> int:
        """Run, stop, and return how many blocks were found wrong."""
        for _ in range(iterations):
            self._iterate()
        self._active.clear()
        # What a pass that failed was to save is given up with the next one's orders.
        self.rig.begin()
        self._gpu.synchronize()
        for _ in range(3):
            self.rig.worker.get_finished([], [])
        return int(self._bad) + self._wrong_in_store()

    def _iterate(self) -> None:
        rng, rig = self._rng, self.rig
        new = [running for _ in range(rng.randrange(3)) if (running := self._admit()) is not None]
        batch = [running for running in self._active if running in new or rng.random() < 0.9]
        datas: dict[bool, list[Any]] = {True: [], False: []}
        spans = []
        for running in batch:
            span = self._schedule(running, running in new)
            if span is not None:
                spans.append((running, *span[:2]))
                datas[running in new].append(span[2])
        if spans:
            rig.begin(datas[True], datas[False])
            rig.worker.start_load_kv(self._engine)
            self._stage(any(running.position for running in new))
            if self._forward(spans):
                rig.worker.wait_for_save(self._engine)
            else:
                spans = []
                self._fail()
        for running, _, end in spans:
            running.position = end
            if end == len(running.request.tokens):
                running.request.tokens.append(rng.randrange(1000))
                if end >= running.ends:
                    self._finish(running)
        for running in [r for r in self._active if rng.random() < 0.12]:
            self._active.remove(running)
            self._free += running.pages
            self.counts.cancelled += 1
        ended, _ = rig.worker.get_finished(self._finished, [])
        self._finished = []
        for request_id in ended:
            self._free += self._held.pop(request_id)
        if rng.random() < 0.2:
            rig.worker.get_finished([], [])

    def _admit(self) -> Running | None:
        rng = self._rng
        document = rng.choice(self._documents)
        tokens = [
            *document[: rng.randrange(1, len(document))],
            *rng.choices(range(1000), k=rng.randrange(1, 9)),
        ]
        count = -(-len(tokens) // SIZE)
        if count > len(self._free) or len(self._active) > 4:
            return None
        self._ids += 1
        request = FakeRequest(self._ids, tokens)
        # The pages that were freed last: the worst choice for whoever still reads them.
        pages = [self._free.pop() for _ in range(count)]
        promised, _ = self.rig.leader.get_num_new_matched_tokens(request, 0)
        self.rig.leader.update_state_after_alloc(request, pages)
        self.counts.loaded += promised // SIZE
        running = Running(request, pages, promised, len(tokens) + rng.randrange(10))
        self._active.append(running)
        self.prompts.append(tokens)
        return running

    def _schedule(self, running: Running, is_new: bool) -> tuple[int, int, Any] | None:
        tokens = running.request.tokens
        start = running.position
        end = len(tokens)
        if end - start > SIZE and self._rng.random() < 0.4:
            end = start + self._rng.randrange(1, end - start)
        while len(running.pages) * SIZE < end:
            if not self._free:
                return None
            running.pages.append(self._free.pop())
        told_tokens, told_pages = running.told
        running.told = len(tokens), len(running.pages)
        computed = 0 if is_new else start
        data = self.rig.data(
            running.request, tokens[told_tokens:], running.pages[told_pages:], computed, end - start
        )
        return start, end, data

    def _forward(self, spans: list[tuple[Running, int, int]]) -> bool:
        """Compute layer by layer; False if that fails in the middle."""
        rng = self._rng
        reads, writes = [], []
        for running, start, end in spans:
            for block in range(-(-end // SIZE)):
                page, tokens = running.pages[block], running.request.tokens[: (block + 1) * SIZE]
                if (block + 1) * SIZE <= start:
                    reads.append((page, seed_of(tokens)))
                else:
                    whole = (block + 1) * SIZE <= end
                    writes.append((page, seed_of(tokens) if whole else rng.getrandbits(62) & RANDOM_BITS))
        # A request that the connector never hears of fills up the batch.
        padding = rng.choice(self._free) if self._free else None
        sleeps = rng.random() < 0.5
        if padding is not None:
            self._gpu.run(self._engine, lambda: self._words[padding].fill_(GARBAGE))
        if sleeps:
            self._gpu.sleep(self._engine)
        for layer in range(LAYERS):
            if layer and rng.random() < 0.05:
                return False
            for page, seed in writes:
                self._gpu.run(self._engine, partial(self._write, page, layer, seed))
            for page, seed in reads:
                self._gpu.run(self._engine, partial(self._check, page, layer, seed))
        if not sleeps and rng.random() < 0.3:
            self._gpu.sleep(self._engine)
        return True

    def _write(self, page: int, layer: int, seed: int) -> None:
        torch.bitwise_xor(self._base[layer], seed, out=self._words[page, layer])

    def _check(self, page: int, layer: int, seed: int) -> None:
        self._bad += (self._words[page, layer] != torch.bitwise_xor(self._base[layer], seed)).any()

    def _fail(self) -> None:
        """End all requests with an error, as the engine does after a pass that failed."""
        for running in self._active:
            self._free += running.pages
        self._active.clear()
        self.counts.failed += 1

    def _finish(self, running: Running) -> None:
        self._active.remove(running)
        if self.rig.leader.request_finished(running.request, running.pages):
            self.counts.held += 1
            self._held[running.request.request_id] = running.pages
            self._finished.append(running.request.request_id)
        else:
            self._free += running.pages

    def _stage(self, loading: bool) -> None:
        """Be what brings blocks from disk or bucket: take slots and write to them from the host, at once.

        Sometimes it wants all slots, most often when some of them should be held for loads.
        """
        store = self.rig.store
        count = SLOTS if self._rng.random() < (0.1 if loading else 0.02) else self._rng.randrange(3)
        hashes = [self._rng.randbytes(16) for _ in range(count)]
        tickets = [ticket for ticket in store.reserve(bytes(16), 0, hashes) if ticket is not None]
        for ticket in tickets:
            np.frombuffer(store.slot_view(ticket_slot(ticket)), dtype=np.uint8)[:] = 0xA5
        store.commit(tickets)

    def _wrong_in_store(self) -> int:
        store, wrong = self.rig.store, 0
        for number, tokens in enumerate(self.prompts):
            request = FakeRequest(10**6 + number, [*tokens, 1])
            promised, _ = self.rig.leader.get_num_new_matched_tokens(request, 0)
            promise = self.rig.leader._requests.hear(request.request_id).promise
            for block, slot in enumerate(promise.slots if promised else ()):
                words = torch.from_numpy(whole_block(store, slot).view(np.int64).reshape(LAYERS, -1))
                seed = seed_of(tokens[: (block + 1) * SIZE])
                wrong += not torch.equal(words, torch.bitwise_xor(self._base_host, seed))
            self.rig.leader.request_finished(request, [])
        return wrong


def seed_of(tokens: list[int]) -> int:
    """Return what tells the content of the block that these tokens end with."""
    digest = hashlib.blake2b(repr(tokens).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") & RANDOM_BITS


def whole_block(store: TieredStore, slot: int) -> np.ndarray:
    """Return a block as the pool has it."""
    stored = np.frombuffer(store.slot_view(slot), np.uint8)
    if not isinstance(store.form, PlaneSlots):
        return stored.copy()
    block = np.empty(store.layout.block_bytes, np.uint8)
    store.form.shape.merge(store.form.shard(stored), block)
    return block
