"""A connector that keeps blocks in a dict, in every form the interface has, and checks how it is called."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from kvtier.engine import Engine, EngineConfig, HashModel, Request


@dataclass
class DictStore:
    """What survives an engine, and how the connector shall behave.

    Attributes:
        blocks: Bytes of whole blocks by prefix key: one tensor for each page range.
        load_async: Answer `(n, True)`.
        save_async: Answer True to `request_finished`, and finish saving some polls later.
        rng: Decides how many polls an asynchronous transfer takes.
        calls: How often each method was called.
    """

    blocks: dict[bytes, list[torch.Tensor]] = field(default_factory=dict)
    load_async: bool = False
    save_async: bool = False
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    calls: Counter[str] = field(default_factory=Counter)


@dataclass
class Known:
    tokens: list[int] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    salt: Any = None
    promised: tuple[int, int] = (0, 0)
    external: int = 0
    valid: int = 0


class DictLeader:
    def __init__(self, llm_args: SimpleNamespace) -> None:
        self.store: DictStore = llm_args.store
        self.size = llm_args.kv_cache_config.tokens_per_block
        self.known: dict[int, Known] = {}
        self.loads: list[tuple[bytes, list[int]]] = []
        self.async_loads: dict[int, list[tuple[bytes, list[int]]]] = {}

    def keys(self, tokens: list[int], salt: Any) -> list[bytes]:
        key, keys = repr(salt).encode(), []
        for start in range(0, len(tokens) - self.size + 1, self.size):
            key = hashlib.blake2b(key + repr(tokens[start : start + self.size]).encode()).digest()
            keys.append(key)
        return keys

    def wait_for_initialization(self) -> None:
        self.store.calls["wait_for_initialization"] += 1

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        self.store.calls["get_num_new_matched_tokens"] += 1
        mm = tuple(map(tuple, request.multimodal_hashes or ())), tuple(request.multimodal_positions or ())
        salt = getattr(request, "cache_salt", None) or getattr(request, "cache_salt_id", None)
        tokens = request.get_tokens(0)
        known = self.known[request.request_id] = Known(salt=(salt, request.lora_task_id, mm))
        if computed % self.size:
            return 0, False
        first = computed // self.size
        keys = self.keys(tokens, known.salt)[first : (request.prompt_len - 1) // self.size]
        count = 0
        while count < len(keys) and keys[count] in self.store.blocks:
            count += 1
        known.promised = (first, first + count)
        return count * self.size, self.store.load_async and count > 0

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        self.update_state_after_alloc_by_layer_group(request, [block_ids])

    def update_state_after_alloc_by_layer_group(self, request: Any, pages: list[list[int]]) -> None:
        self.store.calls["update_state_after_alloc"] += 1
        known = self.known.get(request.request_id, Known())
        first, end = known.promised
        keys = self.keys(request.get_tokens(0), known.salt)
        pairs = [(keys[i], [group[i] for group in pages]) for i in range(first, min(end, len(pages[0])))]
        if self.store.load_async and end > first:
            self.async_loads[request.request_id] = pairs
        else:
            self.loads += pairs
            known.external = request.py_num_connector_matched_tokens

    def build_connector_meta(self, output: Any) -> dict[str, Any]:
        self.store.calls["build_connector_meta"] += 1
        saves: list[tuple[bytes, list[int]]] = []
        for data in output.new_requests:
            saves += self._progress(data, self.known.setdefault(data.request_id, Known()))
        for data in output.cached_requests:
            saves += self._progress(data, self.known[data.request_id])
        meta = {"loads": self.loads, "async_loads": self.async_loads, "saves": saves}
        self.loads, self.async_loads = [], {}
        return meta

    def _progress(self, data: Any, known: Known) -> list[tuple[bytes, list[int]]]:
        """Return the blocks that this pass completes (on 1.1: that the last one did)."""
        known.tokens += data.new_tokens
        groups = getattr(data, "new_block_ids_by_layer_group", None) or [data.new_block_ids]
        known.pages = known.pages or [[] for _ in groups]
        for pages, new in zip(known.pages, groups, strict=True):
            pages += new
        valid = data.computed_position + known.external + getattr(data, "num_scheduled_tokens", 0)
        known.external = 0
        keys = self.keys(known.tokens, known.salt)
        chosen = []
        for i in range(known.valid // self.size, min(valid // self.size, len(keys))):
            pages = [group[i] for group in known.pages]
            if keys[i] not in self.store.blocks and min(pages) >= 0:
                chosen.append((keys[i], pages))
        known.valid = max(valid, known.valid)
        return chosen

    def request_finished(self, request: Any, block_ids: list[int]) -> bool:
        return self.request_finished_by_layer_group(request, [block_ids])

    def request_finished_by_layer_group(self, request: Any, pages: list[list[int]]) -> bool:
        self.store.calls["request_finished"] += 1
        self.known.pop(request.request_id, None)
        return self.store.save_async


class DictWorker:
    """Copies at `start_load_kv` and `wait_for_save`; asserts the order of calls."""

    def __init__(self, llm_args: SimpleNamespace) -> None:
        self.store: DictStore = llm_args.store
        self.ranges: list[tuple[int, torch.Tensor]] = []
        self.loading: dict[int, int] = {}
        self.saving: dict[int, int] = {}
        self.pending: dict[int, list[tuple[bytes, list[int]]]] = {}
        self.expected = "register"
        self.layer = 0
        self.layers = 0
        self.warm_ups = 0

    def _enter(self, name: str, *allowed: str) -> None:
        assert self.expected in allowed, f"{name} came when {self.expected} was due"
        self.store.calls[name] += 1

    def register_forward_pass_callable(self) -> Any:
        return self._forward_passed

    def _forward_passed(self) -> None:
        if not self.ranges:
            self.warm_ups += 1
            return
        self._enter("forward_pass", "layers")
        self.expected = "wait_for_save"

    def register_kv_caches(self, tensor: torch.Tensor) -> None:
        self._enter("register_kv_caches", "register")
        self.layers = tensor.shape[1]
        self.ranges = [(0, tensor.view(torch.uint8).view(tensor.shape[0], -1))]
        self.expected = "poll"

    def register_kv_cache_layout(self, layout: Any) -> None:
        self._enter("register_kv_cache_layout", "register")
        self.layers = sum(len(group.layer_ids) for group in layout.groups)
        for group in layout.groups:
            for region in group.regions:
                self.ranges.append((group.layer_group_id, region.as_tensor()))
        self.expected = "poll"

    def bind_connector_meta(self, meta: dict[str, Any]) -> None:
        self._enter("bind_connector_meta", "poll", "bound")
        self.meta = meta
        self.expected = "start_load_kv"

    def start_load_kv(self, stream: Any) -> None:
        self._enter("start_load_kv", "start_load_kv")
        for key, pages in self.meta["loads"]:
            self._load(key, pages)
        self.pending.update(self.meta["async_loads"])
        self.expected, self.layer = "layers", 0

    def wait_for_layer_load(self, layer: int, stream: Any) -> None:
        self._enter("wait_for_layer_load", "layers")
        assert layer == self.layer

    def save_kv_layer(self, layer: int, stream: Any) -> None:
        self._enter("save_kv_layer", "layers")
        assert layer == self.layer
        self.layer += 1

    def wait_for_save(self, stream: Any) -> None:
        # Release 1.1 has no forward-pass callable.
        self._enter("wait_for_save", "layers", "wait_for_save")
        assert self.layer in (0, self.layers)
        for key, pages in self.meta["saves"]:
            self.store.blocks[key] = [rows[pages[group]].clone() for group, rows in self.ranges]
        self.expected = "poll"

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        # After start_load_kv there is no forward when every request of the batch loads asynchronously.
        self._enter("get_finished", "poll", "layers")
        assert self.expected == "poll" or self.layer == 0
        self.expected = "poll"
        for request_id in finished:
            self.saving[request_id] = self.store.rng.randrange(4)
        for request_id in started:
            assert request_id in self.pending, "the load's metadata came too late"
            self.loading[request_id] = self.store.rng.randrange(4)
        loaded = self._due(self.loading)
        for request_id in loaded:
            for key, pages in self.pending.pop(request_id):
                self._load(key, pages)
        return self._due(self.saving), loaded

    def _due(self, waiting: dict[int, int]) -> list[int]:
        due = [request_id for request_id, polls in waiting.items() if polls == 0]
        for request_id in list(waiting):
            waiting[request_id] -= 1
            if request_id in due:
                del waiting[request_id]
        return due

    def _load(self, key: bytes, pages: list[int]) -> None:
        for (group, rows), data in zip(self.ranges, self.store.blocks[key], strict=True):
            if pages[group] >= 0:
                rows[pages[group]] = data


def make_engine(
    config: EngineConfig,
    store: DictStore | None = None,
    *,
    model: Any = None,
    leader: type = DictLeader,
    worker: type = DictWorker,
) -> Engine:
    """Return an engine with the dict connector (or another one) over `store`."""
    arguments = {"store": store if store is not None else DictStore()}
    return Engine(model or HashModel(), config, leader_class=leader, worker_class=worker, llm_args=arguments)


def answer(engine: Engine, request: Request) -> list[int]:
    """Run one request to its end and return its output."""
    request_id = engine.submit(request)
    engine.run()
    return engine.output(request_id)


def expected_answer(request: Request, config: EngineConfig, model: Any = None) -> list[int]:
    """Return what the request yields alone, without connector, reuse, chunks or overlap."""
    blocks = -(-(len(request.prompt) + request.max_new_tokens + 1) // config.tokens_per_block)
    plain = EngineConfig(
        num_blocks=blocks,
        tokens_per_block=config.tokens_per_block,
        kv_dtype=config.kv_dtype,
        block_reuse=False,
        version=config.version,
        layout=config.layout,
        num_groups=config.num_groups,
        window=config.window,
    )
    return answer(Engine(model or HashModel(), plain), request)
