"""Rules 13 and 14 of the contract: whose KV is whose, and what is kept from everybody."""

from __future__ import annotations

import pytest
import torch

from kvtier import _logging
from kvtier.trtllm import KvTierConnectorLeader
from tests.trtllm_support import PROMPT, SIZE, FakeRequest, llm_args


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


def test_rule_14_that_nothing_is_ever_loaded_without_block_reuse_is_said(rig, caplog, monkeypatch):
    monkeypatch.setattr(_logging, "_last", {})
    KvTierConnectorLeader(llm_args(kv_cache_config__enable_block_reuse=False))
    assert "enable_block_reuse" in caplog.text


def test_rule_13_a_request_that_is_asked_about_again_is_who_it_is_now(rig):
    """A cancelled request is never announced: whoever comes under its id may be somebody else."""
    rig.prefill(FakeRequest(1, [*PROMPT, 7], cache_salt="tenant"), range(6))
    promised = [
        rig.leader.get_num_new_matched_tokens(FakeRequest(2, [*PROMPT, 7], cache_salt=salt), 0)[0]
        for salt in ("tenant", "other", "tenant", None)
    ]
    assert promised == [5 * SIZE, 0, 5 * SIZE, 0]
    assert rig.leftovers()["leases"] == 0
