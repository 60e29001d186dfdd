"""Leader and workers as clients of an agent, each rank with one of its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import yaml

from kvtier.agent.client import Deadlines
from kvtier.connector import shared
from kvtier.engine.versions import RequestData12, SchedulerOutput
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker, worker
from tests.agent_support import AgentThread, Place, eventually
from tests.trtllm_support import LAYERS, ROW, SIZE, FakeRequest, content, llm_args

PROMPT = list(range(100, 100 + 5 * SIZE + 1))
RANKS = 2


@pytest.fixture
def agent(monkeypatch, tmp_path):
    place = Place(1 << 20)
    file = tmp_path / "kvtier.yaml"
    settings = {"mode": "external", "directory": str(place.directory)}
    file.write_text(yaml.safe_dump({"memory": {"size": "1MiB"}, "agent": settings}))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    monkeypatch.setattr(shared, "DEADLINES", Deadlines(20.0, 20.0))
    with AgentThread(place) as agent:
        yield agent
    place.remove()


@pytest.mark.parametrize(("kv_factor", "shards"), [(1, 1), (2, RANKS)], ids=["latent", "heads"])
def test_replicated_kv_is_stored_once_and_read_by_all_ranks(agent, monkeypatch, kv_factor, shards):
    arguments = llm_args(tensor_parallel_size=RANKS)
    leader, workers, pools = KvTierConnectorLeader(arguments), [], []
    for rank in range(RANKS):
        monkeypatch.setattr(worker, "rank_here", lambda rank=rank: rank)
        workers.append(KvTierConnectorWorker(arguments))
        pools.append(torch.zeros(16, LAYERS, kv_factor, ROW, dtype=torch.bfloat16))
        workers[-1].register_kv_caches(pools[-1])
    eventually(lambda: len(agent.agent.sessions) == RANKS, "all ranks are attached")
    eventually(lambda: all(s.ready for s in agent.agent.sessions._by_token.values()), "and ready")
    stores = [leader._runtime.store_of(rank) for rank in range(RANKS)]
    eventually(lambda: all(store.connected for store in stores), "and know it")
    (opened,) = agent.stores.open_stores()
    assert opened.store.layout.shards == shards

    def tag(rank: int, page: int) -> object:
        return page if shards == 1 else (rank, page)

    def rows(rank: int, page: int) -> torch.Tensor:
        return pools[rank][page].view(torch.uint8).flatten()

    def run(request: FakeRequest, pages: list[int], computed: bool) -> None:
        leader.update_state_after_alloc(request, pages)
        scheduled = len(PROMPT) if computed else 1
        data = RequestData12(request.request_id, PROMPT, pages, 0, scheduled)
        iterate(SchedulerOutput([data]), pages[:5] if computed else ())

    def iterate(output: SchedulerOutput, computed: Sequence[int] = ()) -> None:
        meta = leader.build_connector_meta(output)
        for rank, kv_worker in enumerate(workers):
            kv_worker.bind_connector_meta(meta)
            kv_worker.start_load_kv(None)
            for page in computed:
                rows(rank, page).copy_(content(tag(rank, page), rows(rank, page).numel()))
            kv_worker.wait_for_save(None)

    def saved(request: FakeRequest) -> bool:
        # One more pass: the agent's answer is used when the request is scheduled next.
        iterate(SchedulerOutput([], [RequestData12(request.request_id, [], [], len(PROMPT) - 1, 1)]))
        return opened.store.stats().get("saved_blocks") == 5

    first = FakeRequest(1, PROMPT)
    assert leader.get_num_new_matched_tokens(first, 0) == (0, False)
    run(first, list(range(6)), computed=True)
    eventually(lambda: saved(first), "the blocks are readable")
    second = FakeRequest(2, PROMPT)
    assert leader.get_num_new_matched_tokens(second, 0) == (5 * SIZE, False)
    run(second, list(range(6, 12)), computed=False)
    for rank in range(RANKS):
        for page in range(5):
            expected = content(tag(rank, page), rows(rank, page).numel())
            assert torch.equal(rows(rank, 6 + page), expected)
    eventually(lambda: opened.store.stats()["leases"] == 0, "every rank has released the lease")
    assert opened.store.stats()["filling_slots"] == 0
    for part in (*workers, leader):
        part.close()


def test_a_leader_that_cannot_leave_the_tail_gives_its_tickets_back(agent, monkeypatch):
    arguments = llm_args(tensor_parallel_size=RANKS)
    leader, kv_worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
    kv_worker.register_kv_caches(torch.zeros(16, LAYERS, 2, ROW, dtype=torch.bfloat16))
    session = leader._session
    (opened,) = eventually_open(agent)
    (layout, namespace) = (opened.store.layout, opened.store.namespace)
    # The other rank, as it would attach from its own process.
    other = shared.attach_store(
        leader._runtime.config, namespace, layout, torch.device("cpu"), session, 1, RANKS
    )
    eventually(lambda: len(agent.agent.sessions) == RANKS)
    eventually(lambda: all(s.ready for s in agent.agent.sessions._by_token.values()))
    tokens = PROMPT[:SIZE]
    request = FakeRequest(1, tokens)
    leader.update_state_after_alloc(request, [0, 1])
    meta = leader.build_connector_meta(SchedulerOutput([RequestData12(1, tokens[:-1], [0], 0, SIZE - 1)]))
    kv_worker.bind_connector_meta(meta)
    request.tokens = [*tokens, 5]
    monkeypatch.setattr(type(other.store), "leave", lambda *_: False)
    assert leader.request_finished(request, [0, 1]) is False
    assert leader.stats()["tails_not_told"] == 1
    eventually(lambda: opened.store.stats()["filling_slots"] == 0, "the tickets are given back")
    for part in (kv_worker, leader, other):
        part.close()


def eventually_open(agent: AgentThread) -> list[object]:
    eventually(agent.stores.open_stores, "the store is open")
    return agent.stores.open_stores()
