"""The contract's rules for connectors, one by one, on a leader and a worker driven by hand."""

from __future__ import annotations

import pickle
import threading
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from kvtier import _logging
from kvtier.engine.versions import SchedulerOutput
from kvtier.trtllm import BrokenPromise, KvTierConnectorLeader, KvTierConnectorWorker, table
from kvtier.trtllm.meta import ConnectorMeta, Save
from tests.trtllm_support import SIZE, FakeRequest, llm_args, make_rig, memory_stores, write_config

PROMPT = list(range(100, 100 + 5 * SIZE))


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))


@pytest.fixture
def rig(monkeypatch):
    with memory_stores(monkeypatch, slots=64):
        yield make_rig()


def test_saved_blocks_are_promised_and_loaded_with_their_bytes(rig):
    first = FakeRequest(1, [*PROMPT, 7])
    assert rig.prefill(first, [3, 4, 5, 6, 7, 8]) == 0
    assert not rig.finish(first, [3, 4, 5, 6, 7, 8])
    second = FakeRequest(2, [*PROMPT, 9])
    assert rig.prefill(second, [20, 21, 22, 23, 24, 25]) == 5 * SIZE
    for block in range(5):
        assert rig.holds(20 + block, (None, PROMPT[: (block + 1) * SIZE]))
    assert rig.leftovers() == {"leases": 0, "filling": 0, "requests": 1, "tails": 0}


@pytest.mark.parametrize(("length", "promised"), [(1, 0), (SIZE, 0), (SIZE + 1, SIZE), (5 * SIZE, 4 * SIZE)])
def test_rule_1_at_least_one_prompt_token_is_left_to_compute(rig, length, promised):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    assert rig.matched(PROMPT[:length]) == promised


def test_rule_1_the_cap_counts_local_and_loaded_tokens_together(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, PROMPT)
    assert rig.leader.get_num_new_matched_tokens(request, 2 * SIZE) == (2 * SIZE, False)
    assert rig.leader.get_num_new_matched_tokens(request, 4 * SIZE) == (0, False)


def test_rule_1_a_prompt_length_below_the_tokens_counts(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    paused = FakeRequest(2, PROMPT)
    paused.prompt_len = 2 * SIZE
    assert rig.leader.get_num_new_matched_tokens(paused, 0) == (SIZE, False)


def test_rule_2_an_unaligned_local_match_is_answered_with_nothing(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 9])
    for computed in (1, SIZE - 1, SIZE + 2):
        assert rig.leader.get_num_new_matched_tokens(request, computed) == (0, False)
    assert rig.leader.get_num_new_matched_tokens(request, SIZE) == (4 * SIZE, False)


def test_rule_3_what_is_still_being_saved_is_not_promised(rig):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6)))
    rig.begin(new=[rig.data(request, request.tokens, range(6), 0, len(request.tokens))])
    rig.worker.start_load_kv(None)
    assert rig.matched([*PROMPT, 8]) == 0
    rig.worker.wait_for_save(None)
    assert rig.matched([*PROMPT, 8]) == 5 * SIZE


def test_rule_3_promised_blocks_are_not_evicted_before_they_are_loaded(monkeypatch):
    with memory_stores(monkeypatch, slots=5):
        rig = make_rig()
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = FakeRequest(2, [*PROMPT, 9])
        assert rig.leader.get_num_new_matched_tokens(request, 0) == (5 * SIZE, False)
        rig.prefill(FakeRequest(3, [t + 5000 for t in PROMPT]), range(6, 12))
        rig.leader.update_state_after_alloc(request, list(range(12, 18)))
        rig.iterate(new=[rig.data(request, request.tokens, range(12, 18), 0, 1)])
        assert all(rig.holds(12 + b, (None, PROMPT[: (b + 1) * SIZE])) for b in range(5))


def test_rule_4_and_5_no_answer_is_asynchronous(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    for length in range(1, len(PROMPT)):
        request = FakeRequest(100 + length, PROMPT[:length])
        assert rig.leader.get_num_new_matched_tokens(request, 0)[1] is False


def test_rule_6_a_tail_is_saved_when_the_engine_goes_idle(rig):
    # 1.1 tells too little to save the prompt in its own pass, and after the last one comes no metadata.
    rig.version = "1.1"
    request = FakeRequest(1, PROMPT[: 2 * SIZE])
    rig.prefill(request, [5, 6])
    request.tokens.append(1)
    assert rig.matched([*request.tokens, 1]) == 0
    assert rig.finish(request, [5, 6, 7])
    assert rig.matched([*request.tokens, 1]) == 2 * SIZE
    assert rig.leftovers() == {"leases": 0, "filling": 0, "requests": 0, "tails": 0}


def test_rule_6_generated_tokens_serve_the_next_turn(rig):
    request = FakeRequest(1, PROMPT[:SIZE])
    rig.prefill(request, [0])
    for token in range(40, 40 + SIZE):
        request.tokens.append(token)
        rig.iterate(cached=[rig.data(request, [token], [1] if token == 40 else [], len(request.tokens) - 1)])
        rig.fill(1, "answer")
    request.tokens.append(99)
    rig.finish(request, [0, 1])
    turn = FakeRequest(2, [*request.tokens, 1, 2, 3])
    assert rig.prefill(turn, [10, 11, 12]) == 2 * SIZE


def test_rule_7_a_cancelled_request_is_forgotten_in_time(rig, monkeypatch):
    now = [0.0]
    rig.leader._requests = table.RequestTable(lambda: now[0])
    rig.prefill(FakeRequest(1, PROMPT), range(5))
    asked = FakeRequest(2, PROMPT)
    rig.leader.get_num_new_matched_tokens(asked, 0)
    assert rig.leftovers()["requests"] == 2
    assert rig.leftovers()["leases"] == 1
    now[0] = table.SILENCE_SECONDS + 1
    rig.iterate()
    assert rig.leftovers() == {"leases": 0, "filling": 0, "requests": 0, "tails": 0}


def test_rule_7_what_is_remembered_is_bounded(rig, monkeypatch):
    monkeypatch.setattr(table, "MAX_REQUESTS", 10)
    rig.prefill(FakeRequest(0, PROMPT), range(5))
    for request_id in range(1, 50):
        rig.leader.get_num_new_matched_tokens(FakeRequest(request_id, PROMPT), 0)
    rig.iterate()
    # One that was heard of again has another turn; it has nothing promised any more.
    assert rig.leftovers()["requests"] == 10
    assert rig.leftovers()["leases"] == 9


class Exploding:
    """Raises whatever is touched."""

    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")


def test_rule_8_nothing_gets_out_of_any_method(rig):
    leader, worker, bad = rig.leader, rig.worker, Exploding()
    assert leader.get_num_new_matched_tokens(bad, 0) == (0, False)
    assert leader.get_num_new_matched_tokens(FakeRequest(1, PROMPT), None) == (0, False)
    assert leader.get_num_new_matched_tokens(FakeRequest(2, [1 << 40] * 9), 0) == (0, False)
    leader.update_state_after_alloc(bad, [1])
    leader.update_state_after_alloc(FakeRequest(1, PROMPT), None)
    leader.update_state_after_alloc_by_layer_group(bad, None)
    assert leader.request_finished(bad, []) is False
    assert leader.request_finished(FakeRequest(1, PROMPT), None) is False
    assert leader.request_finished_by_layer_group(bad, None) is False
    for output in (None, bad, MagicMock(), SchedulerOutput([bad], [None])):
        assert leader.build_connector_meta(output).loads == ()
    for metadata in (None, "?", {}, MagicMock(), (1, 2, 3)):
        worker.bind_connector_meta(metadata)
        worker.start_load_kv(None)
        worker.wait_for_layer_load(0, None)
        worker.save_kv_layer(0, None)
        worker.wait_for_save(None)
    assert worker.get_finished([], []) == ([], [])
    assert sum(value for name, value in leader.stats().items() if name.startswith("errors_")) >= 8


def test_rule_8_a_store_that_raises_is_a_miss(rig, monkeypatch):
    def fail(*_, **__):
        raise OSError("no")

    request = FakeRequest(1, PROMPT)
    for method in ("match", "reserve"):
        monkeypatch.setattr(rig.store, method, fail)
    assert rig.prefill(request, range(5)) == 0
    assert rig.finish(request, range(5)) is False
    monkeypatch.undo()


def test_rule_8_what_was_reserved_before_an_error_is_given_back(rig, monkeypatch):
    requests = [FakeRequest(seed, [seed * 1000 + token for token in PROMPT]) for seed in (1, 2)]
    for request in requests:
        rig.leader.update_state_after_alloc(request, list(range(6)))
    real, broken = rig.store.reserve_soon, MagicMock()
    broken.take.side_effect = OSError("no")
    monkeypatch.setattr(rig.store, "reserve_soon", lambda runs: [*real(runs[:1]), broken])
    meta = rig.iterate(new=[rig.data(r, r.tokens, range(6), 0, len(PROMPT)) for r in requests])
    assert meta.saves == ()
    assert rig.store.stats()["filling_slots"] == 0


def test_rule_8_a_save_that_fails_leaves_no_slot_behind(rig, monkeypatch):
    monkeypatch.setattr(rig.worker._transfers.mover, "save", MagicMock(side_effect=RuntimeError("no")))
    rig.prefill(FakeRequest(1, PROMPT), range(5))
    assert rig.leftovers()["filling"] == 0
    assert rig.worker.stats()["save_failed_blocks"] == 5
    assert rig.matched(PROMPT) == 0


def test_rule_9_every_id_comes_back_once_and_no_other(rig):
    assert rig.worker.get_finished([7, 8], [9]) == ([7, 8], [9])
    assert rig.worker.get_finished([], []) == ([], [])
    rig.version = "1.1"
    request = FakeRequest(1, PROMPT[:SIZE])
    rig.prefill(request, [0])
    request.tokens.append(1)
    assert rig.leader.request_finished(request, [0])
    assert rig.worker.get_finished([1, 2], []) == ([1, 2], [])
    assert rig.worker.get_finished([], []) == ([], [])


def test_rule_10_a_tail_holds_the_pages_until_it_is_saved(rig):
    rig.version = "1.1"
    request = FakeRequest(1, PROMPT[:SIZE])
    rig.prefill(request, [0])
    request.tokens.append(1)
    assert rig.leader.request_finished(request, [0]) is True
    # Not handed out before the worker has said so: the page still has its content when that happens.
    assert rig.worker.get_finished([1], []) == ([1], [])
    rig.fill(0, "somebody else's")
    loaded = FakeRequest(2, PROMPT[: SIZE + 1])
    assert rig.prefill(loaded, [4, 5]) == SIZE
    assert rig.holds(4, (None, PROMPT[:SIZE]))


def test_rule_11_constructors_run_side_by_side_and_before_the_pool(monkeypatch):
    arguments, made = llm_args(), {}
    with memory_stores(monkeypatch, slots=8):
        for first, second in (
            (KvTierConnectorLeader, KvTierConnectorWorker),
            (KvTierConnectorWorker, KvTierConnectorLeader),
        ):
            threads = [
                threading.Thread(target=lambda c=c: made.update({c: c(arguments)})) for c in (first, second)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            leader, worker = made[KvTierConnectorLeader], made[KvTierConnectorWorker]
            assert leader._runtime is worker._runtime
            assert leader.get_num_new_matched_tokens(FakeRequest(1, PROMPT), 0) == (0, False)


def test_rule_12_there_is_no_forward_pass_callable_to_fire_early():
    assert not KvTierConnectorWorker(llm_args()).register_forward_pass_callable()


@pytest.mark.parametrize(
    "other",
    [
        {"lora_task_id": 1},
        {"cache_salt": "a"},
        {"cache_salt": ""},
        {"cache_salt_id": 1},
        {"multimodal_hashes": [[1] * 8], "multimodal_positions": [3], "multimodal_lengths": [2]},
    ],
)
def test_rule_13_whoever_differs_in_more_than_tokens_shares_nothing(rig, other):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    assert rig.matched([*PROMPT, 7], **other) == 0
    rig.prefill(FakeRequest(2, [*PROMPT, 7], **other), range(6, 12), tag="other")
    assert rig.matched([*PROMPT, 7], **other) == 5 * SIZE
    request = FakeRequest(3, [*PROMPT, 7])
    assert rig.prefill(request, range(12, 18)) == 5 * SIZE
    assert rig.holds(12, (None, PROMPT[:SIZE]))


def test_rule_13_a_block_means_its_whole_prefix(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    other = [PROMPT[0] + 1, *PROMPT[1:], 7]
    assert rig.matched(other) == 0


def test_rule_13_blocks_before_an_image_are_shared_and_those_from_it_on_are_not(rig):
    image = {"multimodal_hashes": [[1] * 8], "multimodal_positions": [2 * SIZE], "multimodal_lengths": [3]}
    other = {**image, "multimodal_hashes": [[2] * 8]}
    rig.prefill(FakeRequest(1, [*PROMPT, 7], **image), range(6))
    assert rig.matched([*PROMPT, 7], **other) == 2 * SIZE
    assert rig.matched([*PROMPT, 7], **image) == 5 * SIZE


@pytest.mark.parametrize(
    "unnamed",
    [
        {"prompt_embedding_table": torch.ones(2)},
        {"multimodal_embedding": torch.ones(2)},
        {"py_multimodal_data": {"image": torch.ones(2)}},
        {"multimodal_positions": [1], "multimodal_lengths": [2]},
        {"multimodal_hashes": [[1] * 8], "multimodal_positions": [1, 5], "multimodal_lengths": [2, 2]},
        {"return_context_logits": True},
        {"py_return_context_logits": True},
    ],
)
def test_rule_13_content_without_a_name_is_neither_saved_nor_served(rig, unnamed):
    rig.prefill(FakeRequest(1, [*PROMPT, 7], **unnamed), range(6))
    assert rig.matched([*PROMPT, 7]) == 0
    rig.prefill(FakeRequest(2, [*PROMPT, 7]), range(6))
    assert rig.matched([*PROMPT, 7]) == 5 * SIZE
    assert rig.matched([*PROMPT, 7], **unnamed) == 0


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_rule_13_content_without_a_name_leaves_no_tail_either(rig, version):
    rig.version = version
    request = FakeRequest(1, PROMPT, multimodal_embedding=torch.ones(2))
    rig.prefill(request, range(5))
    request.tokens.append(1)
    assert rig.finish(request, range(6)) is False
    assert rig.matched([*PROMPT, 1]) == 0


def test_a_finished_request_with_other_tokens_than_it_had_leaves_no_tail(rig):
    rig.version = "1.1"
    request = FakeRequest(1, PROMPT)
    rig.prefill(request, range(5))
    request.tokens = [9, *PROMPT[1:], 1]
    assert rig.finish(request, range(6)) is False
    assert rig.matched(request.tokens) == 0


def test_rule_13_what_the_engine_tells_only_after_the_promise_keeps_it_from_being_saved(rig):
    rig.prefill(FakeRequest(1, [*PROMPT[:SIZE], 7]), range(2))
    request = FakeRequest(2, [*PROMPT, 7])
    assert rig.leader.get_num_new_matched_tokens(request, 0) == (SIZE, False)
    late = FakeRequest(2, [*PROMPT, 7], py_multimodal_data={"image": torch.ones(1)})
    rig.leader.update_state_after_alloc(late, list(range(6, 12)))
    rig.iterate(new=[rig.data(request, request.tokens, range(6, 12), 0, len(request.tokens) - SIZE)])
    assert rig.holds(6, (None, PROMPT[:SIZE]))
    assert rig.matched([*PROMPT, 7]) == SIZE


def test_rule_13_a_salt_in_the_batch_that_the_request_did_not_have_keeps_it_from_being_saved(rig):
    rig.version = "1.3"
    request = FakeRequest(1, [*PROMPT, 7])
    rig.leader.update_state_after_alloc(request, list(range(6)))
    rig.iterate(new=[rig.data(request, request.tokens, range(6), 0, len(request.tokens), cache_salt_id=5)])
    assert rig.matched([*PROMPT, 7]) == rig.matched([*PROMPT, 7], cache_salt_id=5) == 0


def test_rule_14_without_block_reuse_nobody_asks_and_prompts_are_saved_all_the_same(rig):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.leader.update_state_after_alloc(request, list(range(6)))
    rig.iterate(new=[rig.data(request, request.tokens, range(6), 0, len(request.tokens))])
    assert rig.matched([*PROMPT, 7]) == 5 * SIZE
    assert rig.matched([*PROMPT, 7], cache_salt="x") == 0


def test_rule_14_a_request_of_which_only_the_batch_tells_is_not_saved(rig):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.iterate(new=[rig.data(request, request.tokens, range(6), 0, len(request.tokens))])
    assert rig.store.stats().get("saved_blocks", 0) == 0


def test_rule_14_an_offer_that_the_engine_does_not_take_at_all(rig):
    """With block reuse off, V1 may ask and then compute from the start: its position is before the offer."""
    rig.prefill(FakeRequest(1, [*PROMPT[: 2 * SIZE], 7]), range(3))
    request = FakeRequest(2, [*PROMPT, 7])
    assert rig.leader.get_num_new_matched_tokens(request, 0) == (2 * SIZE, False)
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    chunk = 2 * SIZE

    def forward():
        for block in range(chunk // SIZE):
            rig.fill(6 + block, (None, PROMPT[: (block + 1) * SIZE]))

    rig.iterate(new=[rig.data(request, request.tokens, range(6, 12), -2 * SIZE, chunk)], forward=forward)
    assert rig.matched([*PROMPT, 7]) == 2 * SIZE


def test_rule_15_metadata_of_steady_decode_is_small_plain_data(rig):
    requests = [
        FakeRequest(
            i,
            [
                *(t + 100 * i for t in PROMPT[: SIZE - 1]),
            ],
        )
        for i in range(64)
    ]
    rig.pool = torch.zeros(300, 2, 2, SIZE * 16, dtype=torch.bfloat16)
    rig.worker.register_kv_caches(rig.pool)
    for index, request in enumerate(requests):
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.update_state_after_alloc(request, [index])
    rig.iterate(new=[rig.data(r, r.tokens, [i], 0, SIZE - 1) for i, r in enumerate(requests)])
    for step in range(2 * SIZE):
        for request in requests:
            request.tokens.append(step)
        grown = (SIZE + step) % SIZE == 1
        rig.iterate(
            cached=[
                rig.data(r, [step], [64 * (1 + step // SIZE) + i] if grown else [], len(r.tokens) - 1)
                for i, r in enumerate(requests)
            ]
        )
    sizes = sorted(len(meta) for meta in rig.metas[1:])
    assert sizes[0] < 100
    # All 64 requests complete a block in the same pass.
    assert sizes[-1] < 2048
    assert rig.store.stats()["saved_blocks"] > 64


def test_rule_15_metadata_survives_pickling(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    data = rig.data(request, request.tokens, range(6, 12), 0, 1)
    meta = rig.leader.build_connector_meta(SchedulerOutput([data], []))
    assert meta.loads
    assert pickle.loads(pickle.dumps(meta)) == meta
    assert isinstance(meta, ConnectorMeta)


@pytest.mark.parametrize("honoured", [0, 1, 2, 4, 5])
def test_rule_16_an_offer_honoured_in_part_saves_nothing_that_was_not_computed(rig, honoured):
    """V2 takes `honoured` blocks of the offer and computes one block in this pass."""
    rig.version = "main"
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    longer = [*PROMPT, *range(900, 900 + 2 * SIZE)]
    request = FakeRequest(2, longer, py_num_connector_matched_tokens=0)
    assert rig.leader.get_num_new_matched_tokens(request, 0) == (5 * SIZE, False)
    request.py_num_connector_matched_tokens = honoured * SIZE
    pages = list(range(10, 10 + 7))
    rig.leader.update_state_after_alloc_by_layer_group(request, [pages])
    data = rig.data(request, longer, pages, 0, SIZE, new_block_ids_by_layer_group=[pages])
    for page in pages:
        rig.fill(page, "garbage")
    rig.iterate(new=[data], forward=lambda: rig.fill(10 + honoured, (None, longer[: (honoured + 1) * SIZE])))
    assert rig.matched([*longer, 1]) == max(5, honoured + 1) * SIZE
    check = FakeRequest(3, [*longer, 1])
    count = rig.prefill(check, range(20, 28)) // SIZE
    assert all(rig.holds(20 + b, (None, longer[: (b + 1) * SIZE])) for b in range(count))


def test_rule_16_a_paused_request_is_replayed_as_new_on_other_pages(rig):
    rig.version = "main"
    request = FakeRequest(1, PROMPT[: 2 * SIZE + 1])
    rig.prefill(request, [0, 1, 2])
    request.tokens += [50]
    rig.iterate(cached=[rig.data(request, [50], [], len(request.tokens) - 1)])
    # Paused, its pages given away; then asked again, with what it generated as part of the prompt.
    rig.fill(0, "somebody else's")
    rig.fill(1, "somebody else's")
    request.prompt_len = len(request.tokens)
    assert rig.leader.get_num_new_matched_tokens(request, 0) == (2 * SIZE, False)
    rig.leader.update_state_after_alloc(request, [11, 12, 13])
    rig.iterate(new=[rig.data(request, request.tokens, [11, 12, 13], 0, 2)])
    assert rig.holds(11, (None, PROMPT[:SIZE]))
    assert rig.holds(12, (None, PROMPT[: 2 * SIZE]))
    request.tokens += [51, 52]
    rig.fill(13, "third")
    rig.iterate(cached=[rig.data(request, [51, 52], [14], len(request.tokens) - 1)])
    request.tokens += [53]
    rig.finish(request, [11, 12, 13, 14])
    check = FakeRequest(2, [*request.tokens, 1])
    assert rig.prefill(check, [20, 21, 22, 23]) == 3 * SIZE
    assert rig.holds(22, "third")


def test_rule_16_a_second_question_takes_the_first_answer_back(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 7])
    for computed in (0, 0, SIZE):
        rig.leader.get_num_new_matched_tokens(request, computed)
        assert rig.leftovers()["leases"] == 1
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    rig.iterate(new=[rig.data(request, request.tokens, range(6, 12), SIZE, 1)])
    assert rig.leftovers()["leases"] == 0
    assert not rig.holds(6, (None, PROMPT[:SIZE]))
    assert rig.holds(7, (None, PROMPT[: 2 * SIZE]))


@pytest.mark.parametrize("late", ["subtracted", "counted"])
def test_rule_16_a_promise_is_kept_in_a_later_iteration_than_asked(rig, late):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    rig.iterate()
    computed = 0 if late == "subtracted" else 5 * SIZE
    rig.iterate(new=[rig.data(request, request.tokens, range(6, 12), computed, 1)])
    assert all(rig.holds(6 + b, (None, PROMPT[: (b + 1) * SIZE])) for b in range(5))
    assert rig.leftovers()["leases"] == 0


def test_rule_16_what_the_engine_cancels_of_an_offer_is_not_loaded_and_not_kept(rig):
    rig.version = "main"
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    before = rig.leftovers()
    for request_id, (start, end), left in [
        (2, (0, 5 * SIZE), range(0)),
        (3, (0, 2 * SIZE), range(2, 5)),
        (4, (3 * SIZE, 5 * SIZE), range(3)),
        (5, (5 * SIZE, 5 * SIZE + 1), range(5)),
        (6, (2 * SIZE, 3 * SIZE), range(5)),
        (7, (2 * SIZE - 1, 6 * SIZE), range(2)),
    ]:
        request = FakeRequest(request_id, [*PROMPT, 7])
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.cancel_load(request, start, end)
        assert rig.leftovers()["leases"] == bool(left)
        request.py_num_connector_matched_tokens = len(left) * SIZE
        pages = list(range(6, 12))
        for page in pages:
            rig.fill(page, "own")
        position = left.start * SIZE if left else 0
        data = rig.data(request, request.tokens, pages, position, 1, new_block_ids_by_layer_group=[pages])
        rig.iterate(new=[data])
        for block in range(5):
            assert rig.holds(6 + block, (None, PROMPT[: (block + 1) * SIZE]) if block in left else "own")
        rig.leader.request_reset(request)
        assert rig.leftovers() == before
    rig.leader.cancel_load(FakeRequest(99, PROMPT), 0, SIZE)


def test_rule_16_of_a_request_that_was_reset_nothing_stays(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    before = rig.leftovers()
    request = FakeRequest(2, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    assert rig.leftovers()["leases"] == 1
    rig.leader.request_reset(request)
    assert rig.leftovers() == before
    # It runs again without being asked about, on other pages.
    rig.leader.update_state_after_alloc(request, list(range(12, 18)))
    assert rig.iterate(new=[rig.data(request, request.tokens, range(12, 18), 0, 21)]).loads == ()


def test_rule_17_ranks_in_other_processes_are_not_half_supported(monkeypatch):
    with memory_stores(monkeypatch, slots=8) as opened:
        arguments = llm_args(tensor_parallel_size=2)
        leader, worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
        worker.register_kv_caches(torch.zeros(4, 2, 2, 64))
        assert leader.get_num_new_matched_tokens(FakeRequest(1, PROMPT), 0) == (0, False)
        assert not leader.request_finished(FakeRequest(1, PROMPT), [0])
        assert opened == []


def test_drafts_are_never_saved_before_they_are_accepted(rig):
    rig.version = "1.3"
    request = FakeRequest(1, PROMPT[:SIZE])
    rig.prefill(request, [0])
    request.tokens.append(40)
    # Three drafts behind the last token would fill block 1, if they were all accepted.
    rig.iterate(cached=[rig.data(request, [40], [1], SIZE, 4)])
    rig.fill(1, "whole")
    request.tokens += [41, 42, 43, 44]
    assert rig.matched([*request.tokens, 1]) == SIZE
    rig.iterate(cached=[rig.data(request, [41, 42, 43, 44], [2], 2 * SIZE, 4)])
    check = FakeRequest(2, [*request.tokens, 1])
    assert rig.prefill(check, [10, 11, 12]) == 2 * SIZE
    assert rig.holds(11, "whole")


def test_chunks_are_saved_as_they_complete(rig):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6)))
    position = 0
    for chunk, whole in ((6, 1), (6, 3), (9, 5)):
        data = rig.data(
            request, [] if position else request.tokens, [] if position else range(6), position, chunk
        )
        if position:
            rig.iterate(cached=[data])
        else:
            rig.iterate(new=[data])
        position += chunk
        assert rig.store.stats()["saved_blocks"] == whole


def test_a_request_stopped_in_its_prefill_saves_only_what_is_certain(rig):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6)))
    rig.begin(new=[rig.data(request, request.tokens, range(6), 0, 2 * SIZE)])
    rig.worker.start_load_kv(None)
    # The forward pass fails: no `wait_for_save`, and (1.2) a request that failed is announced as finished.
    assert not rig.leader.request_finished(request, list(range(6)))
    rig.iterate()
    assert rig.leftovers() == {"leases": 0, "filling": 0, "requests": 0, "tails": 0}
    assert rig.matched([*PROMPT, 7]) == 0


def test_orders_are_carried_out_once(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 7])
    rig.prefill(request, range(6, 12))
    rig.fill(6, "overwritten since")
    # 1.3 binds nothing in an idle iteration: the old metadata stays.
    for _ in range(2):
        rig.worker.start_load_kv(None)
        rig.worker.wait_for_save(None)
    assert rig.holds(6, "overwritten since")


def test_a_promise_whose_lease_ran_out_is_renewed_from_what_is_still_there(monkeypatch):
    now = [0.0]
    with memory_stores(monkeypatch, slots=64, clock=lambda: now[0]):
        rig = make_rig()
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = FakeRequest(2, [*PROMPT, 7])
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.update_state_after_alloc(request, list(range(6, 12)))
        now[0] = 1000.0
        rig.iterate(new=[rig.data(request, request.tokens, range(6, 12), 0, 1)])
        assert all(rig.holds(6 + b, (None, PROMPT[: (b + 1) * SIZE])) for b in range(5))


def test_a_promise_that_cannot_be_kept_stops_the_engine(monkeypatch):
    now = [0.0]
    with memory_stores(monkeypatch, slots=5, clock=lambda: now[0]):
        rig = make_rig()
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = FakeRequest(2, [*PROMPT, 7])
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.update_state_after_alloc(request, list(range(6, 12)))
        now[0] = 1000.0
        rig.prefill(FakeRequest(3, [t + 5000 for t in PROMPT]), range(12, 17))
        with pytest.raises(BrokenPromise, match="lost their lease"):
            rig.begin(new=[rig.data(request, request.tokens, range(6, 12), 0, 1)])


def test_a_promise_that_is_gone_and_that_the_engine_took_nothing_of_stops_nobody(monkeypatch):
    now = [0.0]
    with memory_stores(monkeypatch, slots=5, clock=lambda: now[0]):
        rig = make_rig("main")
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = FakeRequest(2, [*PROMPT, 7], py_num_connector_matched_tokens=0)
        rig.leader.get_num_new_matched_tokens(request, 0)
        pages = list(range(6, 12))
        rig.leader.update_state_after_alloc(request, pages)
        now[0] = 1000.0
        rig.prefill(FakeRequest(3, [t + 5000 for t in PROMPT]), range(12, 17))
        data = rig.data(request, request.tokens, pages, 0, 21, new_block_ids_by_layer_group=[pages])
        assert rig.iterate(new=[data]).loads == ()
        assert rig.leftovers()["leases"] == 0


def test_a_promise_with_a_page_outside_the_pool_stops_the_engine(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    for pages in ([1000, *range(7, 12)], [-1, *range(7, 12)]):
        request = FakeRequest(pages[0], [*PROMPT, 7])
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.update_state_after_alloc(request, pages)
        rig.begin(new=[rig.data(request, request.tokens, pages, 0, 1)])
        with pytest.raises(BrokenPromise, match="its pool has 32"):
            rig.worker.start_load_kv(None)


def test_a_promise_without_a_page_stops_the_engine(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    with pytest.raises(BrokenPromise, match="block 3 and tells no page"):
        rig.begin(new=[rig.data(request, request.tokens, [6, 7, 8], 0, 1)])


def test_a_promise_whose_store_is_closed_stops_the_engine(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, 7])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    rig.leader.close()
    with pytest.raises(BrokenPromise, match="closed"):
        rig.begin(new=[rig.data(request, request.tokens, range(6, 12), 0, 1)])


def test_a_batch_that_cannot_be_read_stops_the_engine_only_if_something_is_promised(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    broken = SimpleNamespace(request_id=2, new_tokens=None, new_block_ids=None, computed_position=0)
    request = FakeRequest(2, [*PROMPT, 7])
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    assert rig.leader.build_connector_meta(SchedulerOutput([broken], [])).loads == ()
    rig.leader.get_num_new_matched_tokens(request, 0)
    with pytest.raises(BrokenPromise):
        rig.leader.build_connector_meta(SchedulerOutput([broken], []))


def test_orders_of_a_pass_that_was_called_off_are_given_up(rig):
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    request = FakeRequest(2, [*PROMPT, *range(70, 80)])
    rig.leader.get_num_new_matched_tokens(request, 0)
    rig.leader.update_state_after_alloc(request, list(range(6, 14)))
    rig.begin(new=[rig.data(request, request.tokens, range(6, 14), 0, 10)])
    assert rig.leftovers()["filling"] == 2
    assert rig.leftovers()["leases"] == 1
    rig.begin()
    assert rig.leftovers()["filling"] == rig.leftovers()["leases"] == 0
    assert rig.worker.stats()["orders_given_up"] == 3


def test_rule_2_partial_reuse_is_counted_and_said(rig, caplog, monkeypatch):
    """Left on, as the engine has it by default, it makes nearly every local match end inside a block."""
    monkeypatch.setattr(_logging, "_last", {})
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    assert rig.leader.get_num_new_matched_tokens(FakeRequest(2, [*PROMPT, 9]), SIZE + 1) == (0, False)
    assert rig.leader.stats()["lookups_inside_block"] == 1
    assert "enable_partial_reuse" in caplog.text


def test_rule_14_that_nothing_is_ever_loaded_without_block_reuse_is_said(rig, caplog, monkeypatch):
    monkeypatch.setattr(_logging, "_last", {})
    KvTierConnectorLeader(llm_args(kv_cache_config__enable_block_reuse=False))
    assert "enable_block_reuse" in caplog.text


def test_rule_8_orders_that_make_no_sense_are_no_orders(rig, monkeypatch):
    """They come through a socket; and the engine counts on every id that it has named."""
    mailbox = MagicMock(fetch=lambda request_id: b"[" * 10**6)
    runtime = rig.worker._runtime
    rig.iterate()
    monkeypatch.setattr(runtime, "_joined", set())
    monkeypatch.setattr(runtime._stores[0], "mailbox", mailbox)
    assert rig.worker.get_finished([5], []) == ([5], [])


class TestLeasesWithAnEnd:
    """While the agent hangs a lease cannot be held, and a rank may stand still for longer than it lasts."""

    @pytest.fixture
    def promised(self, rig, monkeypatch):
        """A rig whose lease ends at 60, with the order to load bound; and the clock."""
        now = [0.0]
        rig.worker._clock = lambda: now[0]
        monkeypatch.setattr(rig.store, "hold", lambda lease: 60.0)
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = FakeRequest(2, [*PROMPT, 9])
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.update_state_after_alloc(request, list(range(6, 12)))
        rig.begin(new=[rig.data(request, request.tokens, range(6, 12), 0, 1)])
        return rig, now

    def test_one_that_still_runs_is_loaded(self, promised):
        rig, now = promised
        now[0] = 59.0
        rig.worker.start_load_kv(None)
        assert rig.holds(6, (None, PROMPT[:SIZE]))

    def test_one_that_is_over_is_not(self, promised):
        rig, now = promised
        now[0] = 60.0
        with pytest.raises(BrokenPromise, match="ended before"):
            rig.worker.start_load_kv(None)
        assert not rig.holds(6, (None, PROMPT[:SIZE]))

    def test_one_that_ends_while_it_is_copied_stops_the_engine(self, promised, monkeypatch):
        rig, now = promised
        load = rig.worker._transfers.load

        def stopped_meanwhile(*arguments):
            now[0] = 60.0
            load(*arguments)

        monkeypatch.setattr(rig.worker._transfers, "load", stopped_meanwhile)
        with pytest.raises(BrokenPromise, match="ended before"):
            rig.worker.start_load_kv(None)


def test_a_rank_that_stood_still_loads_what_was_promised_however_late(monkeypatch):
    now = [0.0]
    with memory_stores(monkeypatch, slots=5, clock=lambda: now[0]):
        rig = make_rig()
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = FakeRequest(2, [*PROMPT, 9])
        rig.leader.get_num_new_matched_tokens(request, 0)
        rig.leader.update_state_after_alloc(request, list(range(6, 12)))
        rig.begin(new=[rig.data(request, request.tokens, range(6, 12), 0, 1)])
        now[0] = 10_000.0
        # The slots are wanted by others, and stay what they are.
        assert rig.store.reserve(bytes(16), 0, [bytes([n]) * 16 for n in range(5)]) == [None] * 5
        rig.worker.start_load_kv(None)
        assert all(rig.holds(6 + b, (None, PROMPT[: (b + 1) * SIZE])) for b in range(5))
        assert rig.leftovers()["leases"] == 0


def test_orders_of_a_leader_that_nobody_knows_are_not_carried_out(rig):
    rig.fill(0, "somebody's")
    (ticket,) = rig.store.reserve(bytes(16), 0, [b"h" * 16])
    rig.worker.bind_connector_meta(ConnectorMeta(rig.leader._session ^ 2, (), (Save(ticket, (0,)),), 1))
    rig.worker.start_load_kv(None)
    rig.worker.wait_for_save(None)
    assert rig.store.match([b"h" * 16]).slots == ()
    rig.iterate()
    assert rig.matched([*PROMPT, 7]) == 0
