"""Leader and workers as clients of an agent, each rank with one of its own."""

from __future__ import annotations

import torch

from kvtier.connector import shared
from kvtier.engine.versions import RequestData12, SchedulerOutput
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.agent_support import AgentThread, eventually
from tests.trtllm_support import LAYERS, ROW, SIZE, FakeRequest, llm_args

PROMPT = list(range(100, 100 + 5 * SIZE + 1))
RANKS = 2


def test_a_leader_that_cannot_leave_the_tail_gives_its_tickets_back(connectors_agent, monkeypatch):
    arguments = llm_args(tensor_parallel_size=RANKS)
    leader, kv_worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
    kv_worker.register_kv_caches(torch.zeros(16, LAYERS, 2, ROW, dtype=torch.bfloat16))
    session = leader._session
    (opened,) = eventually_open(connectors_agent)
    (layout, namespace) = (opened.store.layout, opened.store.namespace)
    # The other rank, as it would attach from its own process.
    other = shared.attach_store(
        leader._runtime.config, namespace, layout, torch.device("cpu"), session, 1, RANKS
    )
    eventually(lambda: len(connectors_agent.agent.sessions) == RANKS)
    eventually(lambda: all(s.ready for s in connectors_agent.agent.sessions._by_token.values()))
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
