"""Rule 15 of the contract: what the leader's orders weigh."""

from __future__ import annotations

import pickle

import torch

from kvtier.engine.versions import SchedulerOutput
from kvtier.trtllm.meta import ConnectorMeta, Save
from tests.trtllm_support import PROMPT, SIZE, FakeRequest


def test_a_pass_in_which_a_batch_of_64_saves_a_block_each_takes_less_than_2_kib_with_the_agents_tickets():
    epoch, generation = 2**31 - 1, 2**31 - 1
    saves = tuple(Save(epoch << 63 | generation << 32 | slot, (100_000 + slot,)) for slot in range(64))
    assert len(pickle.dumps(ConnectorMeta(2**62 - 1, (), saves, 10**6, 10**6))) < 2048


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
