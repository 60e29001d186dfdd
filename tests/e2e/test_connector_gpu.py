"""The connector on a GPU: streams in the right order, an arena that is pinned, bytes that are the same."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from kvtier.engine import Engine, EngineConfig, HashModel, Request
from kvtier.gpu import pin
from kvtier.tiers.memory import MemoryTier
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.trtllm_support import SIZE, FakeRequest, Rig, content, llm_args, memory_stores, write_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROW = 64 * 1024
PAGES = 160
BLOCKS = 64
PROMPT = list(range(BLOCKS * SIZE + 1))


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))


@pytest.fixture
def rig(monkeypatch):
    """Blocks of 1 MiB, so that copies take long enough to be overtaken."""
    with memory_stores(monkeypatch, slots=2 * BLOCKS):
        arguments = llm_args()
        pool = torch.zeros(PAGES, 4, 2, ROW, dtype=torch.bfloat16, device="cuda")
        leader, worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
        worker.register_kv_caches(pool)
        yield Rig(leader, worker, pool)
        worker.close()


def start(rig: Rig, request: FakeRequest, pages: list[int]) -> int:
    """Let a request's first pass begin; returns the tokens that were promised."""
    promised, _ = rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, pages)
    rig.begin(new=[rig.data(request, request.tokens, pages, 0, len(request.tokens) - promised)])
    return promised


def expected(pages: int) -> torch.Tensor:
    return torch.stack([content(page, 4 * 2 * ROW * 2) for page in range(pages)]).cuda()


def busy(stream: torch.cuda.Stream) -> None:
    """Keep a stream occupied for some milliseconds, so that whoever does not wait for it comes too early."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)


def rows(pool: torch.Tensor) -> torch.Tensor:
    return pool.view(PAGES, -1).view(torch.uint8)


def test_a_save_waits_for_the_forward_pass_and_the_next_pass_for_the_save(rig):
    stream, wanted = torch.cuda.Stream(), expected(BLOCKS)
    # Kernels are loaded when they first run, and that waits for the whole GPU.
    rows(rig.pool)[:BLOCKS] = wanted
    rows(rig.pool)[:BLOCKS].fill_(0x11)
    torch.cuda.synchronize()
    request = FakeRequest(1, PROMPT)
    assert start(rig, request, list(range(BLOCKS + 1))) == 0
    rig.worker.start_load_kv(stream)
    busy(stream)
    with torch.cuda.stream(stream):
        rows(rig.pool)[:BLOCKS] = wanted
    rig.worker.wait_for_save(stream)
    # The request is cancelled and its pages go to another one, which writes to them in the next pass.
    rig.begin()
    rig.worker.start_load_kv(stream)
    with torch.cuda.stream(stream):
        rows(rig.pool)[:BLOCKS].fill_(0xEE)
    assert not stream.query()
    rig.worker.wait_for_save(stream)
    torch.cuda.synchronize()
    rig.worker.get_finished([], [])
    assert rig.leftovers()["filling"] == 0
    target = list(range(BLOCKS, 2 * BLOCKS + 1))
    assert start(rig, FakeRequest(2, PROMPT), target) == BLOCKS * SIZE
    rig.worker.start_load_kv(stream)
    with torch.cuda.stream(stream):
        loaded = rows(rig.pool)[target[:BLOCKS]].clone()
    torch.cuda.synchronize()
    assert torch.equal(loaded, wanted)


def test_nothing_waits_for_the_gpu_and_leases_last_until_the_copies_have_ended(rig):
    stream = torch.cuda.Stream()
    request = FakeRequest(1, PROMPT)
    start(rig, request, list(range(BLOCKS + 1)))
    rig.worker.start_load_kv(stream)
    rows(rig.pool)[:BLOCKS] = expected(BLOCKS)
    torch.cuda.synchronize()
    busy(stream)
    rig.worker.wait_for_save(stream)
    rig.worker.get_finished([], [])
    assert not stream.query()
    assert rig.leftovers()["filling"] == BLOCKS
    assert rig.matched(PROMPT) == 0
    torch.cuda.synchronize()
    rig.worker.get_finished([], [])
    assert rig.leftovers()["filling"] == 0

    start(rig, FakeRequest(2, PROMPT), list(range(BLOCKS, 2 * BLOCKS + 1)))
    busy(stream)
    rig.worker.start_load_kv(stream)
    rig.worker.get_finished([], [])
    assert not stream.query()
    assert rig.leftovers()["leases"] == 1
    torch.cuda.synchronize()
    rig.worker.get_finished([], [])
    assert rig.leftovers()["leases"] == 0


def test_a_tail_is_reported_when_its_copies_have_ended(rig):
    rig.version = "1.1"
    stream = torch.cuda.Stream()
    request = FakeRequest(1, PROMPT)
    pages = list(range(BLOCKS + 1))
    start(rig, request, pages)
    rig.worker.start_load_kv(stream)
    busy(stream)
    with torch.cuda.stream(stream):
        rows(rig.pool)[:BLOCKS] = expected(BLOCKS)
    rig.worker.wait_for_save(stream)
    request.tokens.append(7)
    assert rig.leader.request_finished(request, pages)
    assert rig.worker.get_finished([1], []) == ([], [])
    torch.cuda.synchronize()
    assert rig.worker.get_finished([], []) == ([1], [])
    target = list(range(BLOCKS, 2 * BLOCKS + 1))
    assert start(rig, FakeRequest(2, PROMPT), target) == BLOCKS * SIZE
    rig.worker.start_load_kv(stream)
    torch.cuda.synchronize()
    assert torch.equal(rows(rig.pool)[target[:BLOCKS]], expected(BLOCKS))


def test_the_arena_is_pinned_until_the_engine_is_gone(rig):
    view = torch.frombuffer(rig.store.slot_view(0), dtype=torch.uint8)
    assert view.is_pinned()
    rig.worker.close()
    rig.leader.close()
    assert not view.is_pinned()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("version", "layout"), [("1.1", "flat"), ("1.3", "flat"), ("main", "groups")])
def test_outputs_are_the_same_with_and_without_the_connector(monkeypatch, version, layout, overlap):
    rng = random.Random(f"{version} {layout} {overlap}")
    document = [rng.randrange(1000) for _ in range(200)]
    wanted = [
        Request([*document[: rng.randrange(1, 200)], rng.randrange(1000)], rng.randrange(1, 30))
        for _ in range(12)
    ]
    config = EngineConfig(
        num_blocks=40,
        tokens_per_block=8,
        max_tokens_per_step=32,
        overlap=overlap,
        version=version,
        layout=layout,
        device="cuda",
    )

    def run(connector: dict[str, type]) -> tuple[Engine, list[list[int]]]:
        engine = Engine(HashModel(head_dim=64), config, **connector)
        ids = [engine.submit(request) for request in wanted]
        engine.settle()
        return engine, [engine.output(request_id) for request_id in ids]

    _, expected_outputs = run({})
    connector = {"leader_class": KvTierConnectorLeader, "worker_class": KvTierConnectorWorker}
    with memory_stores(monkeypatch, slots=256):
        # The first engine stays: the store, which is memory alone, goes with the last one.
        (_, cold), (engine, warm) = first, second = run(connector), run(connector)
        assert cold == warm == expected_outputs
        assert engine.connector.leader.stats()["promised_tokens_memory"] > 0
        assert first[0] is not second[0]


def test_memory_that_cannot_be_pinned_leaves_no_error_behind():
    memory = MemoryTier(1 << 20, 4096)
    pinned = pin(memory.buffer(), torch.device("cuda"))
    assert pinned is not None
    assert pin(memory.buffer(), torch.device("cuda")) is None
    assert torch.ones(3, device="cuda").sum().item() == 3
    pinned.unpin()


@pytest.mark.parametrize("act", ["pin", "unpin"])
def test_an_arena_comes_and_goes_while_the_engine_captures_a_graph(act):
    """An agent's client pins in its own thread, when the agent is there; engines capture at their start."""
    memory = MemoryTier(1 << 20, 4096)
    device = torch.device("cuda")
    pinned = [pin(memory.buffer(), device)] if act == "unpin" else []
    values = torch.zeros(4, device=device)
    values += 1

    def come_or_go() -> None:
        if pinned:
            pinned.pop().unpin()
        else:
            pinned.append(pin(memory.buffer(), device))

    thread = threading.Thread(target=come_or_go)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values += 1
        thread.start()
        thread.join()
        values += 1
    graph.replay()
    assert values.tolist() == [3.0] * 4
    if act == "pin":
        assert pinned[0] is not None
        pinned[0].unpin()


def test_what_is_under_way_at_the_end_is_waited_for(rig):
    """The slots of an engine that is gone belong to others: nothing may write to them any more."""
    stream = torch.cuda.Stream()
    start(rig, FakeRequest(1, PROMPT), list(range(BLOCKS + 1)))
    rig.worker.start_load_kv(stream)
    busy(stream)
    rig.worker.wait_for_save(stream)
    rig.worker.get_finished([], [])
    assert not stream.query()
    shared = rig.leader._runtime._stores[0]
    shared.close()
    assert stream.query()
    assert rig.worker._transfers._saves[-1].event.query()
