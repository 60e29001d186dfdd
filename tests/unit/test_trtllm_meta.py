"""What the leader's orders weigh."""

from __future__ import annotations

import pickle

from kvtier.trtllm.meta import ConnectorMeta, Save


def test_a_pass_in_which_a_batch_of_64_saves_a_block_each_takes_less_than_2_kib_with_the_agents_tickets():
    epoch, generation = 2**31 - 1, 2**31 - 1
    saves = tuple(Save(epoch << 63 | generation << 32 | slot, (100_000 + slot,)) for slot in range(64))
    assert len(pickle.dumps(ConnectorMeta(2**62 - 1, (), saves, 10**6, 10**6))) < 2048
