"""The engine keeps the contract, and notices connectors that do not."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from kvtier.engine import EngineConfig, HashModel, Multimodal, Request
from tests.engine_support import DictLeader, DictStore, DictWorker, answer, expected_answer, make_engine

SIZE = 8
PROMPT = [(7 * i + 3) % 997 for i in range(5 * SIZE + 3)]

WAYS = [
    pytest.param({"version": "1.1"}, id="1.1"),
    pytest.param({"version": "1.2"}, id="1.2"),
    pytest.param({"version": "1.2", "overlap": True}, id="1.2-overlap"),
    pytest.param({"version": "1.3", "max_tokens_per_step": SIZE}, id="1.3-chunked"),
    pytest.param({"version": "main", "overlap": True, "max_tokens_per_step": 2 * SIZE}, id="main-flat"),
    pytest.param({"version": "main", "layout": "groups", "num_groups": 1}, id="main-one-group"),
    pytest.param({"version": "main", "layout": "groups", "max_tokens_per_step": 3 * SIZE}, id="main-groups"),
    pytest.param({"version": "main", "layout": "groups", "overlap": True, "window": 19}, id="main-window"),
]


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(**{"num_blocks": 40, "tokens_per_block": SIZE, **changes})


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("load_async", [False, True])
def test_a_new_engine_loads_what_an_old_one_saved(ways: dict[str, Any], load_async: bool) -> None:
    store = DictStore(load_async=load_async)
    request = Request(PROMPT, max_new_tokens=SIZE + 4)
    expected = expected_answer(request, config(**ways))
    assert answer(make_engine(config(**ways), store), request) == expected

    warm = make_engine(config(**ways), store)
    request_id = warm.submit(request)
    warm.run()
    assert warm.output(request_id) == expected
    metrics = warm.metrics(request_id)
    whole = "max_tokens_per_step" not in ways or ways.get("layout") != "groups"
    assert metrics.tokens_external == (5 * SIZE if whole else 2 * SIZE)
    assert metrics.tokens_local == 0
    assert metrics.tokens_computed == len(PROMPT) - metrics.tokens_external
    assert metrics.ttft_s is not None

    turn = Request([*PROMPT, *expected], max_new_tokens=3)
    assert answer(make_engine(config(**ways), store), turn) == expected_answer(turn, config(**ways))
    assert store.calls["request_finished"] == 3
    assert store.calls["get_finished"] >= store.calls["wait_for_save"] > 0


@pytest.mark.parametrize("ways", WAYS)
def test_one_wrong_byte_changes_the_output(ways: dict[str, Any]) -> None:
    store = DictStore()
    request = Request(PROMPT, max_new_tokens=4)
    expected = answer(make_engine(config(**ways), store), request)
    for pieces in store.blocks.values():
        pieces[-1][11] ^= 1
    assert answer(make_engine(config(**ways), store), request) != expected


def test_a_promise_that_is_not_kept_shows() -> None:
    class Forgetful(DictWorker):
        def _load(self, key: bytes, pages: list[int]) -> None:
            pass

    store = DictStore()
    request = Request(PROMPT, max_new_tokens=4)
    expected = answer(make_engine(config(), store), request)
    assert answer(make_engine(config(), store, worker=Forgetful), request) != expected


def test_salts_adapters_and_images_are_kept_apart() -> None:
    image = Multimodal(hash=[1, 2, 3, 4, 5, 6, 7, 8], position=SIZE + 2, length=4)
    other = Multimodal(hash=[1, 2, 3, 4, 5, 6, 7, 9], position=SIZE + 2, length=4)
    requests = [
        Request(PROMPT, 4),
        Request(PROMPT, 4, cache_salt="a"),
        Request(PROMPT, 4, cache_salt="b"),
        Request(PROMPT, 4, lora_id=7),
        Request(PROMPT, 4, multimodal=[image]),
        Request(PROMPT, 4, multimodal=[other]),
    ]
    store = DictStore()
    engine = make_engine(config(num_blocks=100), store)
    answers = [answer(engine, request) for request in requests]
    assert answers == [expected_answer(request, config()) for request in requests]
    assert len({tuple(a) for a in answers}) == len(requests)
    assert [answer(engine, request) for request in requests] == answers


def test_without_block_reuse_the_connector_is_never_asked_but_told() -> None:
    store = DictStore()
    request = Request(PROMPT, max_new_tokens=4)
    for _ in range(2):
        engine = make_engine(config(block_reuse=False), store)
        assert answer(engine, request) == expected_answer(request, config())
    assert store.calls["get_num_new_matched_tokens"] == 0
    assert store.calls["update_state_after_alloc"] == 2
    assert store.blocks


def test_pages_stay_until_the_save_is_reported() -> None:
    store = DictStore(save_async=True)
    engine = make_engine(config(num_blocks=8), store)
    first = engine.submit(Request(PROMPT, max_new_tokens=4))
    while not engine.output(first):
        engine.step()
    store.rng.seed(3)  # the first answer of this seed is one poll
    engine.run()
    assert list(engine.scheduler.held) == [first]
    assert engine.cache.pool.available < 8
    second = engine.submit(Request(PROMPT[1:], max_new_tokens=4))
    engine.settle()
    assert engine.output(second) == expected_answer(Request(PROMPT[1:], 4), config())
    assert engine.cache.pool.available == 8


def test_get_finished_is_driven_in_idle_iterations() -> None:
    store = DictStore()
    engine = make_engine(config(), store)
    engine.idle(5)
    assert store.calls["get_finished"] == 5
    assert store.calls["build_connector_meta"] == 0


def test_warm_up_fires_the_callable_before_registration() -> None:
    order: list[str] = []

    class Watching(DictWorker):
        def register_forward_pass_callable(self) -> Any:
            return lambda: order.append("callable")

        def register_kv_caches(self, tensor: torch.Tensor) -> None:
            order.append("register")

    make_engine(config(), worker=Watching)
    assert order == ["callable", "callable", "register"]


def test_replayed_graphs_run_no_layer_hooks() -> None:
    store = DictStore()
    engine = make_engine(config(graph_decode=True), store)
    answer(engine, Request(PROMPT, max_new_tokens=5))
    assert store.calls["wait_for_layer_load"] == HashModel().spec.layers
    assert store.calls["wait_for_save"] == 5


def test_request_data_has_the_fields_of_its_release() -> None:
    common = {"request_id", "new_tokens", "new_block_ids", "computed_position"}
    fields = {
        "1.1": common,
        "1.2": common | {"num_scheduled_tokens"},
        "1.3": common | {"num_scheduled_tokens", "priorities", "cache_salt_id"},
        "main": common
        | {"num_scheduled_tokens", "priorities", "cache_salt", "block_hashes"}
        | {"new_block_ids_by_layer_group"},
    }
    for version, names in fields.items():
        outputs: list[Any] = []

        class Watching(DictLeader):
            def build_connector_meta(self, output: Any, outputs: list[Any] = outputs) -> dict[str, Any]:
                outputs.append(output)
                return super().build_connector_meta(output)

        engine = make_engine(config(version=version, max_tokens_per_step=2 * SIZE), leader=Watching)
        answer(engine, Request(PROMPT, max_new_tokens=2))
        first, *rest = outputs
        assert set(vars(first.new_requests[0])) == names
        assert first.new_requests[0].new_tokens == PROMPT
        assert [d.computed_position for o in rest for d in o.cached_requests] == [16, 32, len(PROMPT)]
        assert all(not o.new_requests for o in rest)


def test_loaded_tokens_are_left_out_of_the_position_in_the_matching_iteration_only() -> None:
    positions: list[tuple[int, int]] = []

    class Watching(DictLeader):
        def build_connector_meta(self, output: Any) -> dict[str, Any]:
            for data in (*output.new_requests, *output.cached_requests):
                positions.append((data.computed_position, data.num_scheduled_tokens))
            return super().build_connector_meta(output)

    store = DictStore()
    answer(make_engine(config(), store), Request(PROMPT[: 3 * SIZE + 1], 1))
    engine = make_engine(config(max_tokens_per_step=SIZE), store, leader=Watching)
    answer(engine, Request(PROMPT, 2))
    assert positions == [(0, SIZE), (4 * SIZE, SIZE), (5 * SIZE, 3), (len(PROMPT), 1)]
    positions.clear()
    store.load_async = True
    engine = make_engine(config(max_tokens_per_step=SIZE), store, leader=Watching)
    answer(engine, Request(PROMPT, 2))
    assert positions == [(5 * SIZE, 3), (len(PROMPT), 1)]


@pytest.mark.parametrize(
    ("promise", "error"),
    [
        ((len(PROMPT), False), AssertionError),
        ((len(PROMPT) + SIZE, True), AssertionError),
        ((-SIZE, False), AssertionError),
        ((0, True), RuntimeError),
    ],
)
def test_impossible_promises_kill_the_engine(promise: tuple[int, bool], error: type[Exception]) -> None:
    class Boasting(DictLeader):
        def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
            return promise

    engine = make_engine(config(), leader=Boasting)
    engine.submit(Request(PROMPT))
    with pytest.raises(error):
        engine.step()
    with pytest.raises(RuntimeError, match="died"):
        engine.step()


@pytest.mark.parametrize("saving", [False, True])
def test_unknown_and_repeated_ids_kill_the_engine(saving: bool) -> None:
    class Babbling(DictWorker):
        def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
            return ([41], []) if saving else ([], [41])

    engine = make_engine(config(), worker=Babbling)
    with pytest.raises(KeyError):
        engine.step()

    class Repeating(DictWorker):
        def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
            return finished + finished, []

    engine = make_engine(config(), DictStore(save_async=True), worker=Repeating)
    engine.submit(Request(PROMPT, 1))
    with pytest.raises(KeyError):
        engine.run()


def test_metadata_must_survive_pickle() -> None:
    class Attached(DictLeader):
        def build_connector_meta(self, output: Any) -> Any:
            return {"callback": lambda: None}

    engine = make_engine(config(), leader=Attached)
    engine.submit(Request(PROMPT))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        engine.step()


@pytest.mark.parametrize("method", ["wait_for_layer_load", "save_kv_layer", "wait_for_save"])
def test_errors_in_the_forward_fail_every_active_request(method: str) -> None:
    class Failing(DictWorker):
        broken = True

    def fail(self: DictWorker, *arguments: Any) -> None:
        if Failing.broken:
            self.expected = "poll"
            raise OSError("broken")
        getattr(DictWorker, method)(self, *arguments)

    setattr(Failing, method, fail)
    store = DictStore()
    engine = make_engine(config(max_batch_size=2), store, worker=Failing)
    failed = [engine.submit(Request(PROMPT)), engine.submit(Request(PROMPT[1:]))]
    waiting = engine.submit(Request(PROMPT, 3))
    events = engine.step()
    assert [(e.request_id, e.reason) for e in events] == [(i, "failed") for i in failed]
    assert store.calls["request_finished"] == 0
    Failing.broken = False
    engine.run()
    assert engine.output(waiting) == expected_answer(Request(PROMPT, 3), config())


def test_cancelled_requests_are_not_announced_and_free_their_pages() -> None:
    store = DictStore()
    engine = make_engine(config(max_tokens_per_step=2 * SIZE, num_blocks=8), store)
    running = engine.submit(Request(PROMPT, 16))
    waiting = engine.submit(Request(PROMPT, 16))
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    events = engine.step()
    assert {(e.request_id, e.reason) for e in events} == {(running, "cancelled"), (waiting, "cancelled")}
    assert engine.cache.pool.available == 8
    assert store.calls["request_finished"] == 0
    assert answer(engine, Request(PROMPT, 4)) == expected_answer(Request(PROMPT, 4), config())


@pytest.mark.parametrize("save_async", [False, True])
def test_some_builds_announce_cancelled_requests(save_async: bool) -> None:
    store = DictStore(save_async=save_async)
    engine = make_engine(config(announce_cancelled=True, num_blocks=8), store)
    running = engine.submit(Request(PROMPT, 16))
    waiting = engine.submit(Request(PROMPT, 16))
    engine.step()
    engine.cancel(running)
    engine.cancel(waiting)
    engine.settle()
    assert store.calls["request_finished"] == 1
    assert engine.cache.pool.available == 8


@pytest.mark.parametrize("version", ["1.3", "main"])
def test_pages_of_a_cancelled_load_are_free_at_once_until_main(version: str) -> None:
    class Never(DictWorker):
        finish = False

        def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
            self.expected = "poll"
            if self.finish:
                return [], list(self.pending)
            return [], []

    store = DictStore()
    answer(make_engine(config(), store), Request(PROMPT, 1))
    store.load_async = True
    engine = make_engine(config(version=version, num_blocks=8), store, worker=Never)
    request_id = engine.submit(Request(PROMPT, 1))
    engine.step()
    engine.cancel(request_id)
    engine.step()
    assert (engine.cache.pool.available == 8) == (version == "1.3")
    Never.finish = True
    engine.step()
    assert engine.cache.pool.available == 8


def test_less_than_the_offer_is_taken_chunk_by_chunk() -> None:
    ways = {"version": "main", "layout": "groups"}
    store = DictStore()
    request = Request(PROMPT, 4)
    expected = answer(make_engine(config(**ways), store), request)
    told: list[int] = []

    class Watching(DictLeader):
        def update_state_after_alloc_by_layer_group(self, request: Any, pages: list[list[int]]) -> None:
            told.append(len(pages[0]))
            super().update_state_after_alloc_by_layer_group(request, pages)

    few = make_engine(config(honour_blocks=1, **ways), store, leader=Watching)
    request_id = few.submit(request)
    few.run()
    assert (few.output(request_id), few.metrics(request_id).tokens_external) == (expected, SIZE)
    chunked = make_engine(config(max_tokens_per_step=2 * SIZE, **ways), store, leader=Watching)
    request_id = chunked.submit(request)
    chunked.run()
    assert (chunked.output(request_id), chunked.metrics(request_id).tokens_external) == (expected, SIZE)
    assert told == [6, 2]
