"""A leader and a worker on a small pool, driven by hand: what the connector's tests share."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch

from kvtier.codec import slot_form
from kvtier.config import Config
from kvtier.connector import shared
from kvtier.engine.versions import (
    RequestData11,
    RequestData12,
    RequestData13,
    RequestDataMain,
    SchedulerOutput,
)
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore
from kvtier.tiers.memory import MemoryTier
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker, runtime

SIZE = 4
"""Tokens in a block."""

PROMPT = list(range(100, 100 + 5 * SIZE))

LAYERS, ROW = 2, SIZE * 16
DATA = {"1.1": RequestData11, "1.2": RequestData12, "1.3": RequestData13, "main": RequestDataMain}


def llm_args(model: str | None = "some/model", **changes: Any) -> SimpleNamespace:
    """Return engine arguments; keyword names with a dot's place as `__` reach into them."""
    arguments = SimpleNamespace(
        model=model,
        revision=None,
        dtype="auto",
        tensor_parallel_size=1,
        kv_cache_config=SimpleNamespace(tokens_per_block=SIZE, dtype="auto", host_cache_size=0),
        kv_connector_config=SimpleNamespace(server_url=None),
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        target = arguments
        for part in path:
            target = getattr(target, part)
        setattr(target, last, value)
    return arguments


def content(tag: object, size: int) -> torch.Tensor:
    """Return `size` bytes that follow from `tag`."""
    return torch.frombuffer(bytearray(hashlib.shake_128(repr(tag).encode()).digest(size)), dtype=torch.uint8)


class FakeRequest:
    """The attributes of the engine's request that every release has; more as keywords."""

    def __init__(self, request_id: int, tokens: Sequence[int], **more: Any) -> None:
        self.request_id = request_id
        self.tokens = list(tokens)
        self.prompt_len = len(tokens)
        self.lora_task_id = None
        self.__dict__.update(more)

    def get_tokens(self, beam: int) -> list[int]:
        assert beam == 0
        return list(self.tokens)


@dataclass
class Rig:
    """One engine's connector, and what a simulated executor needs to drive it.

    Attributes:
        leader: The leader.
        worker: The worker.
        pool: `[blocks, layers, 2, row]`.
        store: The store between them.
        version: Whose RequestData to build.
    """

    leader: KvTierConnectorLeader
    worker: KvTierConnectorWorker
    pool: torch.Tensor
    version: str = "1.2"
    metas: list[bytes] = field(default_factory=list)

    @property
    def store(self) -> TieredStore:
        ready = self.leader._runtime.ready
        assert ready is not None
        return ready.store

    def bytes_of(self, page: int) -> torch.Tensor:
        return self.pool[page].view(torch.uint8).flatten()

    def fill(self, page: int, tag: object) -> None:
        """Give a page the content that follows from `tag`."""
        rows = self.bytes_of(page)
        rows.copy_(content(tag, rows.numel()))

    def holds(self, page: int, tag: object) -> bool:
        rows = self.bytes_of(page)
        return torch.equal(rows, content(tag, rows.numel()))

    def data(
        self, request: FakeRequest, new_tokens: Sequence[int], pages: Sequence[int], computed: int,
        scheduled: int = 1, **more: Any,
    ) -> Any:  # fmt: skip
        fields = {"num_scheduled_tokens": scheduled} if self.version != "1.1" else {}
        return DATA[self.version](
            request.request_id, list(new_tokens), list(pages), computed, **fields, **more
        )

    def iterate(
        self, new: Sequence[Any] = (), cached: Sequence[Any] = (), forward: Callable[[], None] | None = None
    ) -> Any:
        """Run one iteration: metadata, loads, `forward`, saves. Returns the metadata."""
        self.begin(new, cached)
        self.worker.start_load_kv(None)
        if forward is not None:
            forward()
        self.worker.wait_for_save(None)
        return self.worker.get_connector_meta()

    def begin(self, new: Sequence[Any] = (), cached: Sequence[Any] = ()) -> None:
        """Build the metadata and send it through pickle to the worker."""
        meta = self.leader.build_connector_meta(SchedulerOutput(list(new), list(cached)))
        self.metas.append(pickle.dumps(meta))
        self.worker.bind_connector_meta(pickle.loads(self.metas[-1]))

    def prefill(self, request: FakeRequest, pages: Sequence[int], tag: object | None = None) -> int:
        """Run a whole prompt through one pass, asking first; returns the tokens that were promised.

        The pages of what was computed get the content that follows from the request's tokens, or from `tag`.
        """
        promised, asynchronous = self.leader.get_num_new_matched_tokens(request, 0)
        assert not asynchronous
        self.leader.update_state_after_alloc(request, list(pages))
        tokens = request.tokens

        def forward() -> None:
            for block in range(promised // SIZE, len(tokens) // SIZE):
                self.fill(pages[block], (tag, tokens[: (block + 1) * SIZE]))

        self.iterate(new=[self.data(request, tokens, pages, 0, len(tokens) - promised)], forward=forward)
        return promised

    def finish(self, request: FakeRequest, pages: Sequence[int]) -> bool:
        """End a request and let the worker save its tail; returns the leader's answer."""
        saving = self.leader.request_finished(request, list(pages))
        saved, loaded = self.worker.get_finished([request.request_id] if saving else [], [])
        assert (saved, loaded) == ([request.request_id] if saving else [], [])
        return saving

    def matched(self, tokens: Sequence[int], request_id: int = 10**6, **more: Any) -> int:
        """Return how many leading tokens of a new prompt would be promised, and forget about it."""
        request = FakeRequest(request_id, tokens, **more)
        promised, _ = self.leader.get_num_new_matched_tokens(request, 0)
        self.leader.request_finished(request, [])
        return promised

    def leftovers(self) -> dict[str, float]:
        """Return what must be zero when nothing is under way."""
        stats = self.leader.stats()
        return {
            "leases": stats["store_leases"],
            "filling": stats["store_filling_slots"],
            "requests": stats["requests"],
            "tails": len(self.leader._runtime._tails),
        }


@contextmanager
def memory_stores(monkeypatch: pytest.MonkeyPatch, slots: int, **options: Any) -> Iterator[list[TieredStore]]:
    """Let connectors open stores of `slots` slots over the tiers in `options`; yields those opened."""
    opened: list[TieredStore] = []

    def open_store(config: Config, namespace: Namespace, layout: BlockLayout) -> TieredStore:
        form = slot_form(layout, config.memory.format)
        stride = -(-form.slot_bytes // 4096) * 4096
        memory = MemoryTier(slots * stride, form.slot_bytes)
        store = TieredStore(namespace, layout, memory, form=form, **options)
        opened.append(store)
        return store

    # Whatever earlier tests have left alive is not found.
    monkeypatch.setattr(shared, "_open", WeakValueDictionary())
    monkeypatch.setattr(runtime, "_runtimes", WeakValueDictionary())
    monkeypatch.setattr(shared, "open_store", open_store)
    yield opened
    for store in opened:
        store.close(5)


def write_config(directory: Path, memory: str = "1MiB", disk: bool = False, slots: str = "raw") -> Path:
    """Write a configuration file and return its path."""
    file = directory / "kvtier.yaml"
    text = f"memory:\n  size: {memory}\n  format: {slots}\nagent:\n  mode: inprocess\n"
    if disk:
        text += f"disk:\n  path: {directory / 'disk'}\n  size: 64MiB\n"
    file.write_text(text)
    return file


def make_rig(
    version: str = "1.2", blocks: int = 32, arguments: Any = None, dtype: torch.dtype = torch.bfloat16
) -> Rig:
    """Return a rig over whatever store the environment's configuration opens."""
    arguments = arguments or llm_args()
    pool = torch.zeros(blocks, LAYERS, 2, ROW, dtype=dtype)
    leader, worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
    worker.register_kv_caches(pool)
    return Rig(leader, worker, pool, version)
