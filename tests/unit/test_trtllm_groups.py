"""A leader and a worker on main's layer groups, with an attention window in the second group."""

from __future__ import annotations

import pytest
import torch

from kvtier.engine import EngineConfig, KVMemory, ModelSpec
from kvtier.engine.versions import RequestDataMain, SchedulerOutput
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.trtllm_support import SIZE, FakeRequest, content, llm_args, memory_stores, write_config

PROMPT = list(range(100, 100 + 6 * SIZE + 1))
WINDOW = 2 * SIZE


class Rig:
    def __init__(self) -> None:
        config = EngineConfig(
            num_blocks=32, tokens_per_block=SIZE, version="main", layout="groups", window=WINDOW
        )
        self.memory = KVMemory(ModelSpec(layers=4, kv_heads=2, head_dim=8, vocab_size=10), config)
        arguments = llm_args()
        self.leader, self.worker = KvTierConnectorLeader(arguments), KvTierConnectorWorker(arguments)
        self.worker.register_kv_cache_layout(self.memory.layout)

    def page(self, group: int, page: int) -> list[torch.Tensor]:
        return [region.as_tensor()[page] for region in self.memory.layout.groups[group].regions]

    def fill(self, group: int, page: int, tag: object) -> None:
        for index, part in enumerate(self.page(group, page)):
            part.copy_(content((group, index, tag), part.numel()))

    def holds(self, group: int, page: int, tag: object) -> bool:
        parts = enumerate(self.page(group, page))
        return all(torch.equal(part, content((group, index, tag), part.numel())) for index, part in parts)

    def step(
        self, request: FakeRequest, tokens, pages, computed: int, scheduled: int, new: bool = False
    ) -> None:
        data = RequestDataMain(request.request_id, list(tokens), [], computed, scheduled)
        data.new_block_ids_by_layer_group = [list(ids) for ids in pages]
        output = SchedulerOutput([data], []) if new else SchedulerOutput([], [data])
        self.worker.bind_connector_meta(self.leader.build_connector_meta(output))
        self.worker.start_load_kv(None)
        self.worker.wait_for_save(None)

    def admit(self, request: FakeRequest, pages) -> int:
        promised, _ = self.leader.get_num_new_matched_tokens(request, 0)
        request.py_num_connector_matched_tokens = promised
        self.leader.update_state_after_alloc_by_layer_group(request, pages)
        return promised

    def matched(self) -> int:
        request = FakeRequest(999, PROMPT)
        promised, _ = self.leader.get_num_new_matched_tokens(request, 0)
        self.leader.request_finished_by_layer_group(request, [[], []])
        return promised


@pytest.fixture
def rig(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))
    with memory_stores(monkeypatch, slots=64):
        yield Rig()


def prefill(rig: Rig) -> None:
    """Save the whole prompt, all pages of both groups being there in its one pass."""
    request = FakeRequest(1, PROMPT)
    pages = [list(range(7)), list(range(20, 27))]
    rig.admit(request, pages)
    for group, ids in enumerate(pages):
        for block, page in enumerate(ids):
            rig.fill(group, page, block)
    rig.step(request, PROMPT, pages, 0, len(PROMPT), new=True)


def test_blocks_are_loaded_into_the_pages_that_there_are(rig):
    prefill(rig)
    request = FakeRequest(2, PROMPT)
    # The window has passed the first four blocks: the second group has no pages for them.
    pages = [list(range(8, 15)), [-1, -1, -1, -1, 30, 31, 32]]
    last = rig.memory.num_pages[1] - 1
    rig.fill(1, last, "untouched")
    assert rig.admit(request, pages) == 6 * SIZE
    rig.step(request, PROMPT, pages, 0, 1, new=True)
    assert all(rig.holds(0, 8 + block, block) for block in range(6))
    assert rig.holds(1, 30, 4)
    assert rig.holds(1, 31, 5)
    assert rig.holds(1, last, "untouched")
    assert rig.leader.stats()["store_leases"] == 0


def test_a_block_without_a_page_in_one_group_is_not_saved_and_the_others_are(rig):
    request = FakeRequest(1, PROMPT)
    pages = [list(range(7)), [20, 21, -1, 23, 24, 25, 26]]
    rig.admit(request, pages)
    rig.step(request, PROMPT, pages, 0, len(PROMPT), new=True)
    assert rig.leader.stats()["store_saved_blocks"] == 5
    assert rig.worker.stats()["saved_blocks"] == 5
    assert rig.matched() == 2 * SIZE


def test_a_page_that_the_window_may_have_passed_is_not_saved(rig):
    """The engine said nothing of what it computes; by the next pass the early pages are given away."""
    request = FakeRequest(1, PROMPT)
    pages = [list(range(7)), list(range(20, 27))]
    rig.admit(request, pages)
    rig.step(request, PROMPT, pages, 0, None, new=True)
    request.tokens.append(5)
    rig.fill(1, 20, "another request's")
    rig.step(request, [5], [[], []], len(PROMPT), 1)
    assert rig.matched() == 0
    # Of the six blocks of the prompt only the last lies in the window for certain.
    assert rig.leader.stats()["store_saved_blocks"] == 1


def test_a_tail_is_saved_from_the_pages_that_are_left(rig):
    request = FakeRequest(1, PROMPT)
    pages = [list(range(7)), list(range(20, 27))]
    rig.admit(request, pages)
    rig.step(request, PROMPT, pages, 0, None, new=True)
    request.tokens.append(5)
    left = [pages[0], [-1, 21, 22, 23, 24, 25, 26]]
    assert rig.leader.request_finished_by_layer_group(request, left)
    assert rig.worker.get_finished([1], []) == ([1], [])
    assert rig.leader.stats()["store_saved_blocks"] == 5
    assert rig.leader.stats()["store_filling_slots"] == 0
    assert rig.matched() == 0


def test_lists_without_pages_are_no_error(rig):
    request = FakeRequest(1, PROMPT)
    rig.admit(request, [[], []])
    rig.step(request, PROMPT, [[], []], 0, len(PROMPT), new=True)
    assert rig.leader.request_finished_by_layer_group(request, [[], []]) is False
    assert rig.leader.request_finished_by_layer_group(request, []) is False
