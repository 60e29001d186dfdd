"""The connector under a store, a bucket and an engine that fail: right outputs, nothing left over."""

from __future__ import annotations

import random
import socket

import pytest
import torch

from kvtier.connector import shared
from kvtier.engine import Engine, EngineConfig, HashModel, Request
from kvtier.store.base import Match
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker, table
from tests.trtllm_support import make_rig, memory_stores, write_config

CONNECTOR = {
    "leader_class": KvTierConnectorLeader,
    "worker_class": KvTierConnectorWorker,
    # A commit names the model's weights; without one its KV is private, and nothing goes to the bucket.
    "llm_args": {"revision": "0" * 40},
}
CONFIG = EngineConfig(num_blocks=64, tokens_per_block=8, max_tokens_per_step=32, overlap=True, version="1.3")


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))
    # The threads of several processes at work would wait for each other.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def requests(seed: int, count: int = 12) -> list[Request]:
    rng = random.Random(seed)
    document = [rng.randrange(1000) for _ in range(120)]
    return [
        Request([*document[: rng.randrange(8, 120)], rng.randrange(1000)], rng.randrange(1, 20))
        for _ in range(count)
    ]


def outputs(engine: Engine, wanted: list[Request]) -> list[list[int]]:
    ids = [engine.submit(request) for request in wanted]
    engine.settle()
    engine.idle(2)
    return [engine.output(request_id) for request_id in ids]


class FlakyReservation:
    """An answer that is not there at first, and has less than it could."""

    def __init__(self, store, granted, rng: random.Random) -> None:
        self._store = store
        self._granted = granted
        self._rng = rng

    def take(self, wait=False):
        if not wait and self._rng.random() < 0.6:
            return None
        tickets = self._granted.take()
        lost = [ticket for ticket in tickets if ticket is not None and self._rng.random() < 0.3]
        self._store.abort(lost)
        return [None if ticket in lost else ticket for ticket in tickets]

    def give_up(self):
        self._granted.give_up()


class FlakyStore:
    """A store whose lookups and reservations fail, or find nothing, at random moments."""

    def __init__(self, store, seed: int) -> None:
        self._store = store
        self._rng = random.Random(seed)

    def __getattr__(self, name):
        return getattr(self._store, name)

    def match(self, hashes, wait=None):
        if self._rng.random() < 0.2:
            raise OSError("the store is gone")
        return Match() if self._rng.random() < 0.2 else self._store.match(hashes, wait)

    def reserve_soon(self, runs):
        if self._rng.random() < 0.2:
            raise TimeoutError("the store is slow")
        return [FlakyReservation(self._store, one, self._rng) for one in self._store.reserve_soon(runs)]

    def stats(self):
        if self._rng.random() < 0.2:
            raise OSError("no statistics")
        return self._store.stats()


@pytest.mark.parametrize("seed", range(4))
def test_a_flaky_store_costs_hits_and_nothing_else(monkeypatch, seed):
    wanted = requests(seed)
    expected = outputs(Engine(HashModel(), CONFIG), wanted)
    with memory_stores(monkeypatch, slots=32):
        open_store = shared.open_store
        monkeypatch.setattr(shared, "open_store", lambda *a: FlakyStore(open_store(*a), seed))
        for _ in range(2):
            engine = Engine(HashModel(), CONFIG, **CONNECTOR)
            assert outputs(engine, wanted) == expected
        store = engine.connector.leader._runtime.ready.store._store
        assert store.stats()["leases"] == store.stats()["filling_slots"] == 0


class FailingModel(HashModel):
    """Fails in some forward passes, in the middle of the layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._rng = random.Random(seed)
        self.failures = 0

    def forward(self, spans, memory, before_layer, after_layer):
        fails = self._rng.random() < 0.15

        def after(layer: int) -> None:
            after_layer(layer)
            if fails and layer == 1:
                self.failures += 1
                raise RuntimeError("out of memory")

        return super().forward(spans, memory, before_layer, after)


@pytest.mark.parametrize("seed", range(4))
def test_failed_forward_passes_leave_nothing_wrong_in_the_store(monkeypatch, seed):
    wanted = requests(seed)
    expected = outputs(Engine(HashModel(), CONFIG), wanted)
    with memory_stores(monkeypatch, slots=256) as (opened):
        model = FailingModel(seed)
        failing = Engine(model, CONFIG, **CONNECTOR)
        for got, whole in zip(outputs(failing, wanted), expected, strict=True):
            assert got == whole[: len(got)]
        assert model.failures
        engine = Engine(HashModel(), CONFIG, **CONNECTOR)
        assert outputs(engine, wanted) == expected
        failing.connector.worker.close()
        assert opened[0].stats()["leases"] == opened[0].stats()["filling_slots"] == 0


def test_cancelled_requests_leave_nothing_behind(monkeypatch):
    now = [0.0]
    rng = random.Random(5)
    with memory_stores(monkeypatch, slots=64) as opened:
        engine = Engine(HashModel(), CONFIG, **CONNECTOR)
        engine.connector.leader._requests = table.RequestTable(lambda: now[0])
        for request in requests(5, 40):
            request_id = engine.submit(request)
            for _ in range(rng.randrange(4)):
                engine.step()
            if rng.random() < 0.7:
                engine.cancel(request_id)
        engine.settle()
        now[0] = table.SILENCE_SECONDS + 1
        engine.submit(Request([1, 2, 3], 1))
        engine.settle()
        assert engine.connector.leader.stats()["silent_requests"] > 0
        assert engine.connector.leader.stats()["requests"] == 0
        stats = opened[0].stats()
        assert stats["leases"] == stats["filling_slots"] == 0


def test_a_bucket_that_is_down_is_a_miss(tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something")
    with (tmp_path / "kvtier.yaml").open("a") as file:
        file.write(f"s3:\n  bucket: nowhere\n  endpoint: http://127.0.0.1:{port}\n  region: us-east-1\n")
        file.write("  connect_timeout: 200ms\n  read_timeout: 200ms\nflush_timeout: 1s\n")
    wanted = requests(1, 4)
    expected = outputs(Engine(HashModel(), CONFIG), wanted)
    engine = Engine(HashModel(), CONFIG, **CONNECTOR)
    for _ in range(2):
        assert outputs(engine, wanted) == expected
    stats = engine.connector.leader.stats()
    assert not [name for name in stats if name.startswith("errors_")]
    assert stats["requests"] == 0
    engine.connector.worker.close()
    engine.connector.leader.close()


def test_an_arena_of_one_slot_saves_one_block(monkeypatch):
    with memory_stores(monkeypatch, slots=1) as opened:
        wanted = requests(2)
        engine = Engine(HashModel(), CONFIG, **CONNECTOR)
        assert outputs(engine, wanted) == outputs(Engine(HashModel(), CONFIG), wanted)
        assert opened[0].stats()["save_skipped_blocks"] > 0


def test_a_closed_store_under_a_running_engine_only_stops_caching(monkeypatch):
    with memory_stores(monkeypatch, slots=64) as opened:
        rig = make_rig()
        opened[0].close(1)
        wanted = requests(3)
        engine = Engine(HashModel(), CONFIG, **CONNECTOR)
        opened[1].close(1)
        assert outputs(engine, wanted) == outputs(Engine(HashModel(), CONFIG), wanted)
        assert rig.iterate().loads == ()
