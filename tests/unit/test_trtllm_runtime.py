"""How leaders and workers of one process find each other and their store, and how that ends."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest
import torch

from kvtier.connector import shared
from kvtier.engine.versions import RequestData12, SchedulerOutput
from kvtier.errors import ConfigError, LayoutError
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker, runtime, worker
from kvtier.trtllm.meta import Save
from kvtier.trtllm.runtime import LEADER, join
from tests.trtllm_support import (
    LAYERS,
    ROW,
    SIZE,
    FakeRequest,
    content,
    llm_args,
    make_rig,
    memory_stores,
    write_config,
)

PROMPT = list(range(100, 100 + 5 * SIZE + 1))


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))


@pytest.fixture
def opened(monkeypatch):
    with memory_stores(monkeypatch, slots=64) as stores:
        yield stores


@pytest.mark.parametrize("prefix", ["", "file://", "kvtier:"])
def test_the_options_may_name_the_configuration(tmp_path, monkeypatch, prefix):
    monkeypatch.delenv("KVTIER_CONFIG")
    file = write_config(tmp_path, memory="2MiB")
    arguments = llm_args(kv_connector_config__server_url=f"{prefix}{file}")
    assert KvTierConnectorLeader(arguments)._runtime.config.memory.size == 2 << 20


def test_a_wrong_configuration_stops_the_start(tmp_path, monkeypatch):
    (tmp_path / "kvtier.yaml").write_text("memory: {size: 1parsec}\n")
    for connector in (KvTierConnectorLeader, KvTierConnectorWorker):
        with pytest.raises(ConfigError, match=r"memory\.size"):
            connector(llm_args())
    monkeypatch.delenv("KVTIER_CONFIG")
    with pytest.raises(ConfigError, match="KVTIER_CONFIG"):
        KvTierConnectorLeader(llm_args())
    with pytest.raises(ConfigError, match="nowhere"):
        KvTierConnectorLeader(llm_args(kv_connector_config__server_url="/nowhere.yaml"))


def test_a_refused_pool_stops_the_start(opened):
    rig = make_rig()
    with pytest.raises(LayoutError):
        rig.worker.register_kv_caches(torch.zeros(4, 2, 63))


def test_an_arena_too_small_for_a_block_stops_the_start():
    arguments = llm_args()
    KvTierConnectorLeader(arguments)
    leader, pool = KvTierConnectorLeader(arguments), torch.zeros(2, 64, 2, 8192)
    with pytest.raises(ConfigError, match="does not hold one block"):
        KvTierConnectorWorker(arguments).register_kv_caches(pool)
    del leader


def test_a_store_that_does_not_open_is_a_miss(monkeypatch, caplog):
    def fail(*_):
        raise OSError("no memory")

    monkeypatch.setattr(shared, "open_store", fail)
    rig = make_rig()
    assert rig.prefill(FakeRequest(1, PROMPT), range(6)) == 0
    assert rig.finish(FakeRequest(1, PROMPT), range(6)) is False
    assert "cannot be opened" in caplog.text


def test_the_pool_may_be_registered_before_there_is_a_leader(opened):
    arguments, pool = llm_args(), torch.zeros(8, LAYERS, 2, ROW)
    kv_worker = KvTierConnectorWorker(arguments)
    kv_worker.register_kv_caches(pool)
    assert opened == []
    leader = KvTierConnectorLeader(arguments)
    assert leader._runtime is kv_worker._runtime
    assert len(opened) == 1


def test_a_pool_registered_again_takes_the_place_of_the_first(opened):
    rig = make_rig()
    rig.prefill(FakeRequest(1, PROMPT), range(6))
    rig.pool = torch.zeros(9, LAYERS, 2, ROW, dtype=torch.bfloat16)
    rig.worker.register_kv_caches(rig.pool)
    assert len(opened) == 1
    assert rig.prefill(FakeRequest(2, PROMPT), range(3, 9)) == 5 * SIZE
    assert rig.holds(3, (None, PROMPT[:SIZE]))
    rig.worker.register_kv_caches(torch.zeros(9, LAYERS, 2, 2 * ROW, dtype=torch.bfloat16))
    assert len(opened) == 2
    assert rig.matched(PROMPT) == 0


def test_a_pool_of_another_shape_uses_the_slots_of_its_own_store(opened):
    rig = make_rig()
    rig.prefill(FakeRequest(1, PROMPT), range(6))
    rig.pool = torch.zeros(32, LAYERS, 2, ROW, dtype=torch.float16)
    rig.worker.register_kv_caches(rig.pool)
    rig.prefill(FakeRequest(2, PROMPT), range(6), tag="second")
    assert opened[1].stats()["saved_blocks"] == 5
    assert rig.prefill(FakeRequest(3, PROMPT), range(10, 16)) == 5 * SIZE
    assert rig.holds(10, ("second", PROMPT[:SIZE]))
    other = make_rig(dtype=torch.float16)
    assert other.prefill(FakeRequest(1, PROMPT), range(6)) == 5 * SIZE
    assert other.holds(0, ("second", PROMPT[:SIZE]))


def test_engines_of_one_process_share_their_store_and_nothing_else(opened):
    arguments = llm_args()
    first, second = make_rig(arguments=arguments), make_rig(arguments=arguments)
    other = make_rig(arguments=llm_args(model="another/model"))
    assert first.leader._runtime is first.worker._runtime
    assert second.leader._runtime is second.worker._runtime
    assert first.leader._runtime is not second.leader._runtime
    assert first.store is second.store
    assert other.store is not first.store
    first.prefill(FakeRequest(1, PROMPT), range(6))
    assert second.matched(PROMPT) == 5 * SIZE
    assert other.matched(PROMPT) == 0


def test_a_worker_joins_no_leader_of_another_model_or_configuration(opened, tmp_path, monkeypatch):
    leader = KvTierConnectorLeader(llm_args())
    assert KvTierConnectorWorker(llm_args(model="another/model"))._runtime is not leader._runtime
    write_config(tmp_path, memory="2MiB")
    assert KvTierConnectorWorker(llm_args())._runtime is not leader._runtime
    write_config(tmp_path)
    assert KvTierConnectorWorker(llm_args())._runtime is leader._runtime


def test_requests_of_the_same_id_in_two_engines_do_not_meet(opened):
    rigs = [make_rig("1.1"), make_rig("1.1")]
    requests = [FakeRequest(1, [seed * 1000 + t for t in range(SIZE)]) for seed in (1, 2)]
    for rig, request in zip(rigs, requests, strict=True):
        rig.prefill(request, [0])
        request.tokens.append(1)
        assert rig.leader.request_finished(request, [0])
    for rig in rigs:
        assert rig.worker.get_finished([1], []) == ([1], [])
    for rig, request in zip(rigs, requests, strict=True):
        assert rig.prefill(FakeRequest(2, request.tokens), [4, 5]) == SIZE
        assert rig.holds(4, (None, request.tokens[:SIZE]))


def test_a_worker_that_met_the_wrong_leader_goes_over_to_its_own(opened, monkeypatch):
    arguments = llm_args()
    stale = KvTierConnectorLeader(arguments)
    kv_worker = KvTierConnectorWorker(arguments)
    leader = KvTierConnectorLeader(arguments)
    assert kv_worker._runtime is stale._runtime
    kv_worker.register_kv_caches(torch.zeros(8, LAYERS, 2, ROW))
    assert leader.get_num_new_matched_tokens(FakeRequest(1, PROMPT), 0) == (0, False)
    transfers = kv_worker._transfers
    # The engine's thread is in its first pass: it neither waits for copies nor prepares the pool again.
    monkeypatch.setattr(transfers, "drain", lambda: pytest.fail("waits"))
    kv_worker.bind_connector_meta(leader.build_connector_meta(SchedulerOutput()))
    assert kv_worker._transfers is transfers
    assert kv_worker._runtime is leader._runtime
    assert leader._runtime.ready is not None
    assert stale._runtime.session != leader._session


def test_a_tail_is_not_taken_by_a_worker_that_does_not_know_its_leader(opened):
    arguments = llm_args()
    leader = KvTierConnectorLeader(arguments)
    kv_worker = KvTierConnectorWorker(arguments)
    kv_worker.register_kv_caches(torch.zeros(8, LAYERS, 2, ROW))
    leader._runtime.add_tail(5, [Save(1, (0,))])
    assert kv_worker.get_finished([5], []) == ([5], [])
    assert leader._runtime.take_tail(5, 0) == (Save(1, (0,)),)
    assert leader._runtime.take_tail(5, 0) == ()


def test_tails_that_nobody_asks_for_give_their_slots_back(opened):
    now = [0.0]
    arguments = llm_args()
    kv_worker = KvTierConnectorWorker(arguments)
    leader = KvTierConnectorLeader(arguments)
    leader._runtime._clock = lambda: now[0]
    kv_worker.register_kv_caches(torch.zeros(8, LAYERS, 2, ROW))
    store = opened[0]
    (ticket,) = store.reserve(bytes(16), 0, [b"h" * 16])
    leader._runtime.add_tail(5, [Save(ticket, (0,))])
    now[0] = runtime.TAIL_SECONDS + 1
    leader.build_connector_meta(SchedulerOutput())
    assert leader._runtime._tails == {}
    assert store.stats()["filling_slots"] == 0


def test_the_store_closes_when_the_last_part_is_gone(monkeypatch, tmp_path):
    write_config(tmp_path, disk=True)
    rig = make_rig()
    rig.prefill(FakeRequest(1, PROMPT), range(6))
    leader, kv_worker, store = rig.leader, rig.worker, rig.store
    del rig
    del leader
    gc.collect()
    assert not store._closed
    del kv_worker
    gc.collect()
    assert store._closed
    again = make_rig()
    assert again.prefill(FakeRequest(1, PROMPT), range(6)) == 5 * SIZE
    assert again.holds(2, (None, PROMPT[: 3 * SIZE]))
    assert again.leader.stats()["promised_tokens_disk"] == 5 * SIZE


def test_the_store_closes_when_both_have_closed(opened):
    rig, other = make_rig(), make_rig()
    rig.leader.close()
    assert rig.leader.get_num_new_matched_tokens(FakeRequest(1, PROMPT), 0) == (0, False)
    rig.worker.close()
    rig.worker.close()
    assert not opened[0]._closed
    other.worker.close()
    other.leader.close()
    assert opened[0]._closed
    rig.iterate()
    assert rig.worker.get_finished([1], []) == ([1], [])


def test_a_closed_engine_takes_nobody_in(opened):
    arguments = llm_args()
    leader = KvTierConnectorLeader(arguments)
    leader.close()
    assert KvTierConnectorWorker(arguments)._runtime is not leader._runtime


def two_ranks(monkeypatch) -> tuple[KvTierConnectorLeader, list[KvTierConnectorWorker], list[torch.Tensor]]:
    arguments = llm_args(tensor_parallel_size=2)
    leader, workers, pools = KvTierConnectorLeader(arguments), [], []
    for rank in (0, 1):
        monkeypatch.setattr(worker, "rank_here", lambda rank=rank: rank)
        workers.append(KvTierConnectorWorker(arguments))
        pools.append(torch.zeros(16, LAYERS, 2, ROW, dtype=torch.bfloat16))
    return leader, workers, pools


def test_ranks_of_one_process_each_have_their_shard(monkeypatch, opened):
    leader, workers, pools = two_ranks(monkeypatch)
    workers[0].register_kv_caches(pools[0])
    assert leader._runtime.ready is None
    workers[1].register_kv_caches(pools[1])
    (store,) = opened
    assert store.layout.shards == 2

    def run(meta, forward=lambda rank: None):
        for rank, kv_worker in enumerate(workers):
            kv_worker.bind_connector_meta(meta)
            kv_worker.start_load_kv(None)
            forward(rank)
            kv_worker.wait_for_save(None)

    def fill(rank):
        for page in range(5):
            rows = pools[rank][page].view(torch.uint8).flatten()
            rows.copy_(content((rank, page), rows.numel()))

    request = FakeRequest(1, PROMPT)
    leader.get_num_new_matched_tokens(request, 0)
    leader.update_state_after_alloc(request, list(range(6)))
    data = RequestData12(1, PROMPT, list(range(6)), 0, len(PROMPT))
    run(leader.build_connector_meta(SchedulerOutput([data])), fill)
    request = FakeRequest(2, PROMPT)
    assert leader.get_num_new_matched_tokens(request, 0) == (5 * SIZE, False)
    leader.update_state_after_alloc(request, list(range(6, 12)))
    data = RequestData12(2, PROMPT, list(range(6, 12)), 0, 1)
    run(leader.build_connector_meta(SchedulerOutput([data])))
    for rank, page in ((0, 0), (0, 4), (1, 0), (1, 4)):
        rows = pools[rank][6 + page].view(torch.uint8).flatten()
        assert torch.equal(rows, content((rank, page), rows.numel()))
    assert store.stats()["leases"] == store.stats()["filling_slots"] == 0


def test_ranks_with_pools_of_different_shapes_are_not_served(monkeypatch, opened):
    leader, workers, pools = two_ranks(monkeypatch)
    workers[0].register_kv_caches(pools[0])
    workers[1].register_kv_caches(torch.zeros(16, LAYERS, 2, 2 * ROW, dtype=torch.bfloat16))
    assert leader._runtime.ready is None
    assert opened == []
    workers[1].register_kv_caches(pools[1])
    workers[0].register_kv_caches(pools[0])
    assert leader._runtime.ready is not None


def test_a_block_that_one_rank_could_not_save_is_never_promised(monkeypatch, opened):
    leader, workers, pools = two_ranks(monkeypatch)
    for kv_worker, pool in zip(workers, pools, strict=True):
        kv_worker.register_kv_caches(pool)

    def fail(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(workers[1]._transfers.mover, "save", fail)
    request = FakeRequest(1, PROMPT)
    leader.update_state_after_alloc(request, list(range(6)))
    meta = leader.build_connector_meta(
        SchedulerOutput([RequestData12(1, PROMPT, list(range(6)), 0, len(PROMPT))])
    )
    for kv_worker in workers:
        kv_worker.bind_connector_meta(meta)
        kv_worker.start_load_kv(None)
        kv_worker.wait_for_save(None)
    assert leader.get_num_new_matched_tokens(FakeRequest(2, PROMPT), 0) == (0, False)
    assert opened[0].stats()["filling_slots"] == 0


def test_tails_are_taken_by_every_rank_once(opened):
    engine = join(llm_args(tensor_parallel_size=2), LEADER, 1)
    engine.add_tail(3, [Save(1, (0,))])
    assert [engine.take_tail(3, rank) for rank in (0, 0, 1, 1, 2)] == [
        (Save(1, (0,)),),
        (),
        (Save(1, (0,)),),
        (),
        (),
    ]


def test_a_mixed_up_rank_number_is_a_miss(opened, monkeypatch, caplog):
    arguments = llm_args(tensor_parallel_size=2)
    leader = KvTierConnectorLeader(arguments)
    for _ in range(2):
        KvTierConnectorWorker(arguments).register_kv_caches(torch.zeros(8, LAYERS, 2, ROW))
    caplog.set_level(logging.WARNING)
    assert leader.get_num_new_matched_tokens(FakeRequest(1, PROMPT), 0) == (0, False)
    assert opened == []


def test_arguments_without_any_field_make_a_connector(opened, monkeypatch):
    arguments = SimpleNamespace()
    leader, kv_worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
    kv_worker.register_kv_caches(torch.zeros(8, LAYERS, 2, 32 * 16))
    assert leader._runtime.ready is not None
