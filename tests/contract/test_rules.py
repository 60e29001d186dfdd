"""The contract's rules for connectors, one by one, on a leader and a worker driven by hand.

Rules 3 and 16, of promises, are in test_promises.py, 13 and 14, of what is shared with whom, in
test_sharing.py, and 15 in test_metadata.py.
"""

from __future__ import annotations

import threading
from unittest.mock import MagicMock

import pytest
import torch

from kvtier import _logging
from kvtier.engine.versions import SchedulerOutput
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker, table
from tests.trtllm_support import PROMPT, SIZE, FakeRequest, llm_args, make_rig, memory_stores


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


def test_rule_2_partial_reuse_is_counted_and_said(rig, caplog, monkeypatch):
    """Left on, as the engine has it by default, it makes nearly every local match end inside a block."""
    monkeypatch.setattr(_logging, "_last", {})
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
    assert rig.leader.get_num_new_matched_tokens(FakeRequest(2, [*PROMPT, 9]), SIZE + 1) == (0, False)
    assert rig.leader.stats()["lookups_inside_block"] == 1
    assert "enable_partial_reuse" in caplog.text


def test_rule_8_orders_that_make_no_sense_are_no_orders(rig, monkeypatch):
    """They come through a socket; and the engine counts on every id that it has named."""
    mailbox = MagicMock(fetch=lambda request_id: b"[" * 10**6)
    runtime = rig.worker._runtime
    rig.iterate()
    monkeypatch.setattr(runtime, "_joined", set())
    monkeypatch.setattr(runtime._stores[0], "mailbox", mailbox)
    assert rig.worker.get_finished([5], []) == ([5], [])


@pytest.mark.parametrize("kind", ["pipeline", "context"])
def test_rule_17_ranks_that_hold_other_layers_or_tokens_share_nothing(monkeypatch, kind):
    """The engine refuses these together with a connector; should it not, nothing is promised or saved."""
    with memory_stores(monkeypatch, slots=64) as opened:
        rig = make_rig(arguments=llm_args(**{f"{kind}_parallel_size": 2}))
        assert rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6)) == 0
        assert rig.prefill(FakeRequest(2, [*PROMPT, 7]), range(6, 12)) == 0
        assert opened == []
