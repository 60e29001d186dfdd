"""KV that is equal on all ranks is stored once, and read by all: latents, and regions beside the heads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtier.engine.versions import RequestDataMain, SchedulerOutput
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker, worker
from tests.agent_support import AgentThread, eventually
from tests.trtllm_support import ROW, SIZE, FakeRequest, content, llm_args

BLOCKS = 5
PROMPT = list(range(100, 100 + BLOCKS * SIZE + 1))
LATENT = ROW // SIZE
"""Elements of a token's latent, so that a row of latents has the bytes of a row of heads."""

PAGES = 16
ROW_BYTES = 2 * ROW
SIDE_BYTES = 24
"""Of a page of the side cache of one layer: it divides by 4, and not by 16."""

Part = tuple[torch.Tensor, bool]
"""Bytes `[pages, size]` of a pool, and whether they are equal on all ranks."""


def region(size: int, buffers: Sequence[tuple[int, str]], padding: int = 8) -> tuple[Any, torch.Tensor]:
    """Return a region as main describes it, and its bytes."""
    rows = torch.zeros(PAGES, size + padding, dtype=torch.uint8)[:, :size]
    named = tuple(SimpleNamespace(layer_id=layer, role=role, expansion=1) for layer, role in buffers)
    described = SimpleNamespace(
        base=rows.data_ptr(), size=size, stride=rows.stride(0), num_slots=PAGES, buffers=named,
        as_tensor=lambda: rows,
    )  # fmt: skip
    return described, rows


def flat(kv_worker: KvTierConnectorWorker, kv_factor: int) -> list[Part]:
    pool = torch.zeros(PAGES, 4, kv_factor, ROW, dtype=torch.bfloat16)
    kv_worker.register_kv_caches(pool)
    return [(pool.view(PAGES, -1).view(torch.uint8), kv_factor == 1)]


def grouped(kv_worker: KvTierConnectorWorker, roles: Sequence[str], side: bool) -> list[Part]:
    """Register a pool in two layer groups, each perhaps with a side cache that all ranks have alike."""
    groups, parts = [], []
    for group in range(2):
        layers = [2 * group, 2 * group + 1]
        refs = [(layer, role) for layer in layers for role in roles]
        own, rows = region(len(refs) * ROW_BYTES, refs)
        parts.append((rows, roles == ["key"]))
        beside = []
        for layer in layers if side else ():
            described, rows = region(SIDE_BYTES, [(layer, "index_key")], padding=0)
            beside.append(described)
            parts.append((rows, True))
        groups.append(
            SimpleNamespace(
                layer_group_id=group, layer_ids=tuple(layers), window_size=None, regions=(own,),
                replicated_regions=tuple(beside),
            )
        )  # fmt: skip
    kv_worker.register_kv_cache_layout(
        SimpleNamespace(tokens_per_block=SIZE, groups=tuple(groups), dtype=torch.bfloat16)
    )
    return parts


POOLS: dict[str, tuple[Callable[[KvTierConnectorWorker], list[Part]], bool]] = {
    "flat heads": (lambda w: flat(w, 2), False),
    "flat latents": (lambda w: flat(w, 1), True),
    "grouped heads": (lambda w: grouped(w, ["key", "value"], False), False),
    "grouped heads and a side cache": (lambda w: grouped(w, ["key", "value"], True), False),
    "grouped latents": (lambda w: grouped(w, ["key"], False), True),
    "grouped latents and a side cache": (lambda w: grouped(w, ["key"], True), True),
}
"""How a worker's pool is registered, and whether its model has latents."""


def prefix(tokens: Sequence[int], block: int) -> object:
    """Return what the content of a block follows from."""
    return tuple(tokens[: (block + 1) * SIZE])


class Engine:
    """The connector of an engine with several ranks, and their pools."""

    def __init__(self, kind: str, ranks: int, agent: AgentThread, model: str, monkeypatch: Any) -> None:
        register, _ = POOLS[kind]
        arguments = llm_args(model, tensor_parallel_size=ranks)
        self.leader = KvTierConnectorLeader(arguments)
        self.workers, self.parts = [], []
        for rank in range(ranks):
            monkeypatch.setattr(worker, "rank_here", lambda rank=rank: rank)
            self.workers.append(KvTierConnectorWorker(arguments))
            self.parts.append(register(self.workers[-1]))
        self.by_group = 2 if kind.startswith("grouped") else 0
        eventually(lambda: agent.stores.open_stores(), "the store is open")
        (self.opened,) = agent.stores.open_stores()
        stores = [self.leader._runtime.store_of(rank) for rank in range(ranks)]
        eventually(lambda: all(store.connected for store in stores), "all ranks are attached")
        groups = {session.group for session in agent.agent.sessions._by_token.values()}
        eventually(lambda: all(group.whole for group in groups), "and the agent knows it")
        self._ids = iter(range(1, 1000))

    def fill(self, page: int, tag: object) -> None:
        """Give a page of every rank the content of `tag`, and of the rank where it differs."""
        for rank, parts in enumerate(self.parts):
            for index, (rows, equal) in enumerate(parts):
                rows[page] = content((tag, index, None if equal else rank), rows.shape[1])

    def holds(self, page: int, tag: object) -> bool:
        """Say whether a page of every rank has the content of `tag`."""
        return all(
            torch.equal(rows[page], content((tag, index, None if equal else rank), rows.shape[1]))
            for rank, parts in enumerate(self.parts)
            for index, (rows, equal) in enumerate(parts)
        )

    def serve(self, tokens: Sequence[int], pages: Sequence[int]) -> int:
        """Take a prompt through two passes; fills what was not promised, returns the blocks that were.

        The second pass is there because the agent's tickets may come after the first.
        """
        request = FakeRequest(next(self._ids), tokens)
        promised, _ = self.leader.get_num_new_matched_tokens(request, 0)
        request.py_num_connector_matched_tokens = promised
        blocks = len(tokens) // SIZE
        lists = [list(pages)] * (self.by_group or 1)
        if self.by_group:
            self.leader.update_state_after_alloc_by_layer_group(request, lists)
        else:
            self.leader.update_state_after_alloc(request, lists[0])
        data = RequestDataMain(request.request_id, list(tokens), [], 0, len(tokens) - promised)
        if self.by_group:
            data.new_block_ids_by_layer_group = lists
        else:
            data.new_block_ids = lists[0]
        computed = {pages[block]: prefix(tokens, block) for block in range(promised // SIZE, blocks)}
        self._iterate(SchedulerOutput([data], []), computed)
        before = self.leader._offers

        def ordered() -> bool:
            again = RequestDataMain(request.request_id, [], [], len(tokens) - 1, 1)
            self._iterate(SchedulerOutput([], [again]), {})
            return not before

        eventually(ordered, "what the store takes is ordered")
        self.leader._requests.pop(request.request_id)
        return promised // SIZE

    def _iterate(self, output: SchedulerOutput, computed: dict[int, object]) -> None:
        meta = self.leader.build_connector_meta(output)
        for kv_worker in self.workers:
            kv_worker.bind_connector_meta(meta)
            kv_worker.start_load_kv(None)
        for page, tag in computed.items():
            self.fill(page, tag)
        for kv_worker in self.workers:
            kv_worker.wait_for_save(None)

    def store(self, name: str) -> float:
        """Return what the store counts."""
        return self.opened.store.stats().get(name, 0)

    def settled(self, saved: int) -> None:
        """Wait until so many blocks are readable, and nobody holds anything."""
        eventually(lambda: self.store("saved_blocks") == saved, f"{saved} blocks are saved")
        eventually(lambda: self.store("filling_slots") == self.store("leases") == 0, "nothing is held")

    def close(self) -> None:
        """Leave the agent."""
        for part in (*self.workers, self.leader):
            part.close()


@pytest.fixture
def model(request, tmp_path) -> str:
    """A model's directory, whose configuration tells of latents if the pool has them."""
    _, latent = POOLS[request.getfixturevalue("kind")]
    facts = {"num_hidden_layers": 4, "torch_dtype": "bfloat16", "num_key_value_heads": 8}
    if latent:
        facts |= {"kv_lora_rank": LATENT - 4, "qk_rope_head_dim": 4}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts))
    return str(tmp_path / "model")


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", POOLS)
def test_what_is_equal_on_all_ranks_is_stored_once_and_read_by_all(
    connectors_agent, monkeypatch, model, kind, ranks
):
    with closing(Engine(kind, ranks, connectors_agent, model, monkeypatch)) as engine:
        own = sum(rows.shape[1] for rows, equal in engine.parts[0] if not equal)
        equal = sum(rows.shape[1] for rows, equal in engine.parts[0] if equal)
        assert engine.opened.store.layout.block_bytes == ranks * own + equal
        assert engine.serve(PROMPT, range(BLOCKS + 1)) == 0
        engine.settled(BLOCKS)
        pages = range(BLOCKS + 1, 2 * BLOCKS + 2)
        assert engine.serve(PROMPT, pages) == BLOCKS
        for block in range(BLOCKS):
            assert engine.holds(pages[block], prefix(PROMPT, block))
        engine.settled(BLOCKS)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", POOLS)
def test_a_rank_that_fails_to_commit_frees_the_slot_and_costs_one_block(
    connectors_agent, monkeypatch, model, kind, ranks
):
    def fail(*_: object) -> None:
        raise OSError("this copy fails")

    with closing(Engine(kind, ranks, connectors_agent, model, monkeypatch)) as engine:
        free = engine.store("memory_free")
        once = engine.opened.store.layout.shards == 1
        for failing in range(1 if once else ranks):
            tokens = [1000 * failing + token for token in range(2 * SIZE + 1)]
            assert engine.serve(tokens[: SIZE + 1], (0, 1)) == 0
            engine.settled(2 * failing + 1)
            with monkeypatch.context() as patch:
                patch.setattr(engine.workers[failing]._transfers.mover, "save", fail)
                assert engine.serve(tokens, (2, 3, 4)) == 1
                eventually(lambda: engine.store("filling_slots") == 0, "the slot is free")
            assert engine.store("memory_free") == free - 2 * failing - 1
            # The next one finds the block before, computes this one again, and saves it.
            assert engine.serve(tokens, (5, 6, 7)) == 1
            engine.settled(2 * failing + 2)
            assert engine.serve(tokens, (8, 9, 10)) == 2
            assert engine.holds(9, prefix(tokens, 1))


def test_the_same_pool_at_another_number_of_ranks_is_of_another_namespace(monkeypatch, tmp_path):
    """Slices of what is equal on all ranks are of another size, and lie elsewhere."""
    from kvtier.trtllm.identity import EngineFacts
    from kvtier.trtllm.pool import GroupPool

    seen = []
    for ranks in (1, 2, 4):
        kept: list[GroupPool] = []
        engine = EngineFacts.read(llm_args(str(tmp_path), tensor_parallel_size=ranks))
        catcher = SimpleNamespace(
            register_kv_cache_layout=lambda d, e=engine, k=kept: k.append(GroupPool(d, e))
        )
        grouped(catcher, ["key", "value"], True)
        seen.append(engine.namespace(kept[0].layout, kept[0].signature).id)
    assert len(set(seen)) == 3


def test_what_cannot_be_shared_out_is_stored_by_each_rank(tmp_path):
    from kvtier.trtllm.identity import EngineFacts
    from kvtier.trtllm.pool import GroupPool

    engine = EngineFacts.read(llm_args(str(tmp_path), tensor_parallel_size=5))
    kept: list[GroupPool] = []
    catcher = SimpleNamespace(register_kv_cache_layout=lambda d: kept.append(GroupPool(d, engine, 3)))
    parts = grouped(catcher, ["key", "value"], True)
    assert kept[0].layout.shard_bytes == sum(rows.shape[1] for rows, _ in parts)
    assert kept[0].loads.block_bytes == kept[0].map.block_bytes == kept[0].layout.shard_bytes
