"""What the leader makes of one request's tokens, positions and pages."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from kvtier.connector.adapters import Adapters
from kvtier.connector.hash_cache import CHUNK_BLOCKS, HashCache
from kvtier.engine.versions import RequestData11, RequestData12, RequestDataMain
from kvtier.hashing import MultimodalItem, chain_root, hash_blocks
from kvtier.trtllm.pool import PageGroup
from kvtier.trtllm.request import Identity, Promise, RequestState, salt_of, token_array
from kvtier.trtllm.table import SILENCE_SECONDS, RequestTable
from tests.trtllm_support import FakeRequest

SIZE = 4
FLAT = (PageGroup(0),)
TWO = (PageGroup(0), PageGroup(1, window=8))


def state(**attributes) -> RequestState:
    made = RequestState.start(Identity(), b"namespace", SIZE)
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def data(tokens, pages, computed, scheduled=None, **more):
    if scheduled is None:
        return RequestData11(1, list(tokens), list(pages), computed)
    return RequestData12(1, list(tokens), list(pages), computed, scheduled)


def grouped(tokens, pages, computed, scheduled):
    made = RequestDataMain(1, list(tokens), pages[0] if len(pages) == 1 else [], computed, scheduled)
    made.new_block_ids_by_layer_group = pages
    return made


def test_hashes_are_the_chain_of_the_tokens_however_they_arrive():
    tokens = list(range(50))
    known = state()
    known.advance(data(tokens[:10], range(3), 0, 10), is_new=True)
    known.hash_through(2)
    for token in tokens[10:]:
        known.advance(data([token], [], len(known.tokens), 1), is_new=False)
    expected = hash_blocks(chain_root(b"namespace"), tokens, SIZE)
    assert known.hash_through(12) == expected
    assert known.hash_before(0) == chain_root(b"namespace")
    assert known.hash_before(3) == expected[2]


def test_images_are_where_they_are_however_the_tokens_arrive():
    items = (MultimodalItem(b"image", 9, 6), MultimodalItem(b"another", 25, 3))
    known = state(identity=Identity(items=items))
    for start in range(0, 40, 5):
        known.advance(data(range(start, start + 5), [], start, 5), is_new=start == 0)
        known.hash_through(len(known.tokens) // SIZE)
    assert known.hashes == hash_blocks(chain_root(b"namespace"), list(range(40)), SIZE, multimodal=items)


def test_hashes_of_other_tokens_are_forgotten():
    known = state()
    known.advance(data(range(8), range(2), 0, 8), is_new=True)
    first = list(known.hash_through(2))
    known.handled = 2
    known.advance(data([0, 1, 2, 9, 4, 5, 6, 7], range(2), 0, 8), is_new=True)
    assert known.handled == 0
    assert set(known.hash_through(2)).isdisjoint(first)


@pytest.mark.parametrize(
    ("computed", "scheduled", "valid"),
    [
        (0, None, 0),  # 1.1 says what was computed before this pass, not what it computes.
        (0, 10, 10),
        (0, 4, 4),
        (4, 6, 10),
        (9, 1, 10),  # Overlap: the host lags one token behind.
    ],
)
def test_kv_of_a_prompt_is_valid_up_to_what_the_pass_computes(computed, scheduled, valid):
    assert state().advance(data(range(10), range(3), computed, scheduled), is_new=True) == valid


def test_kv_of_generated_tokens_is_valid_up_to_the_last_one_but_not_of_drafts():
    known = state()
    known.advance(data(range(10), range(3), 0, 10), is_new=True)
    assert known.advance(data([50], [], 10, 1), is_new=False) == 11
    assert known.advance(data([51], [], 11, 4), is_new=False) == 11
    assert known.advance(data([52, 53], [], 13), is_new=False) == 13


def test_it_is_never_more_than_the_tokens_known():
    assert state().advance(data(range(10), range(3), 0, 400), is_new=True) <= 10
    assert state().advance(data(range(10), range(3), 12, 1), is_new=True) == 10


@pytest.mark.parametrize(
    ("position", "computed"),
    [
        (4, 12),  # As V1 reports it: less the promise.
        (12, 12),  # In a later pass: with the promise.
        (8, 12),
        (-4, 4),  # Block reuse off: asked, and nothing taken.
        (-8, 0),
    ],
)
def test_promised_tokens_count_in_the_pass_that_loads_them(position, computed):
    known = state(promise=Promise(1, first=1, slots=(5, 6)))
    known.advance(data(range(20), range(5), position, 1), is_new=True)
    assert known.computed == computed


@pytest.mark.parametrize(
    ("told", "computed"), [(0, 4), (4, 8), (8, 12), (16, 12), (MagicMock(), 4), (None, 4)]
)
def test_v2_counts_only_what_it_honoured(told, computed):
    known = state(
        promise=Promise(1, first=1, slots=(5, 6)),
        request=SimpleNamespace(py_num_connector_matched_tokens=told),
    )
    known.advance(grouped(range(20), [[0, 1, 2, 3]], 4, 4), is_new=True)
    assert known.computed == computed


def test_a_finished_request_is_settled_up_to_its_last_token():
    known = state()
    assert known.settled(10) == 0
    known.advance(data(range(10), range(3), 4, 6), is_new=True)
    assert known.settled(11) == 10
    # Stopped in the prefill: what the last pass was to compute may be missing.
    assert known.settled(10) == 4


def test_a_replay_of_a_request_that_generates_is_a_prefill_again():
    """V1 reports it among the cached requests; only its new allocation tells."""
    known = state()
    known.advance(data(range(10), range(3), 0, 10), is_new=True)
    known.advance(data(range(50, 55), [], 14, 1), is_new=False)
    known.see_allocation([[7, 8, 9, 10]])
    assert known.settled(15) == 0
    assert known.advance(data([], [], 0, 8), is_new=False) == 8
    assert known.settled(15) == 0
    assert known.advance(data([], [], 8, 7), is_new=False) == 15
    assert known.settled(15) == 8
    assert known.settled(16) == 15


def test_pages_come_bit_by_bit():
    known = state()
    known.advance(data(range(10), [7, 8, 9], 0, 10), is_new=True)
    known.advance(data([1], [], 10, 1), is_new=False)
    known.advance(data([1, 2], [3], 12, 1), is_new=False)
    assert [known.pages_of(block, FLAT) for block in range(5)] == [(7,), (8,), (9,), (3,), None]


def test_pages_told_at_allocation_count_until_the_batch_tells_them():
    known = state()
    known.see_allocation([[7, 8, 9]])
    assert known.pages_of(2, FLAT) == (9,)
    known.advance(data(range(10), [], 0, 10), is_new=True)
    assert known.pages_of(2, FLAT) == (9,)
    known.advance(data(range(10), [1, 2], 0, 10), is_new=True)
    assert known.pages_of(0, FLAT) == (1,)
    assert known.pages_of(2, FLAT) is None


def test_v1_tells_a_replayed_request_only_the_pages_beyond_those_it_told_before():
    known = state()
    known.advance(data(range(10), [7, 8, 9], 0, 10), is_new=True)
    known.see_allocation([[21, 22, 23, 24]])
    known.advance(data([1, 2, 3], [24], 0, 13), is_new=False)
    assert [known.pages_of(block, FLAT) for block in range(4)] == [(21,), (22,), (23,), (24,)]


def test_a_page_told_beyond_those_known_stands_at_its_own_place():
    known = state()
    known.advance(data(range(10), [7, 8, 9], 0, 10), is_new=True)
    known.see_allocation([[21]])
    known.advance(data([1, 2, 3], [24], 0, 13), is_new=False)
    assert [known.pages_of(block, FLAT) for block in range(4)] == [(21,), (-1,), (-1,), (24,)]
    known.see_allocation([[31, 32, 33, 34, 35, 36]])
    known.advance(data([1], [], 13, 1), is_new=False)
    known.advance(data([1], [40], 14, 1), is_new=False)
    assert [known.pages_of(block, FLAT) for block in range(6)] == [(31,), (32,), (33,), (34,), (40,), (36,)]


def test_pages_of_groups_go_by_their_ids_as_lists_and_as_mapping():
    groups = (PageGroup(0), PageGroup(2))
    for pages in ([[1, 2], [], [5, 6]], {0: [1, 2], 2: [5, 6]}):
        known = state()
        known.advance(grouped(range(8), pages, 0, 8), is_new=True)
        assert known.pages_of(1, groups) == (2, 6)
    assert known.pages_of(1, (PageGroup(1),)) is None
    assert known.pages_of(1, (PageGroup(3),)) is None


def test_a_block_is_saved_only_from_pages_that_its_window_has_not_passed():
    known = state()
    known.advance(grouped(range(20), [[0, 1, 2, 3, 4], [-1, 11, 12, 13, 14]], 0, 20), is_new=True)
    # All pages were told for this very pass.
    assert [known.can_save(b, known.pages_of(b, TWO), TWO) for b in range(5)] == [
        False,
        True,
        True,
        True,
        True,
    ]
    known.advance(grouped([1], [[], []], 20, 1), is_new=False)
    # The window of 8 tokens reaches back to 13: block 4 is inside, block 3 begins before it.
    assert [known.can_save(b, known.pages_of(b, TWO), TWO) for b in range(5)] == [
        False,
        False,
        False,
        False,
        True,
    ]
    assert known.can_save(0, (0,), FLAT)


def test_whoever_is_heard_of_is_remembered_and_the_silent_are_forgotten():
    now = [0.0]
    requests = RequestTable(lambda: now[0])
    first, second = state(), state()
    requests.add(1, first)
    requests.add(2, second)
    now[0] = SILENCE_SECONDS / 2
    assert requests.hear(1) is first
    assert requests.hear(3) is None
    now[0] = SILENCE_SECONDS + 1
    assert list(requests.pop_silent()) == [second]
    assert requests.hear(1) is first


def test_salts_are_read_from_either_field_and_from_nothing_else():
    assert salt_of(SimpleNamespace(cache_salt="a", cache_salt_id=3)) == "a"
    assert salt_of(SimpleNamespace(cache_salt=None, cache_salt_id=3)) == 3
    assert salt_of(SimpleNamespace(cache_salt="")) == ""
    assert salt_of(SimpleNamespace(cache_salt_id=np.int64(3))) == 3
    assert salt_of(SimpleNamespace()) is None
    assert salt_of(MagicMock()) is None


def test_identity_of_stand_ins_is_that_of_a_plain_request():
    assert Identity.of(MagicMock(), Adapters()) == Identity.of(FakeRequest(1, [1]), Adapters()) == Identity()


@pytest.mark.parametrize("wrap", [list, tuple, np.array])
def test_multimodal_hashes_may_be_lists_or_arrays(wrap):
    request = FakeRequest(
        1,
        range(9),
        multimodal_hashes=[wrap([1, -2] * 4)],
        multimodal_positions=wrap([3]),
        multimodal_lengths=[2],
    )
    (item,) = Identity.of(request, Adapters()).items
    assert (item.start, item.length) == (3, 2)
    other = FakeRequest(
        1, range(9), multimodal_hashes=[[1, 2] * 4], multimodal_positions=[3], multimodal_lengths=[2]
    )
    assert Identity.of(other, Adapters()).items[0].digest != item.digest


@pytest.mark.parametrize("value", [None, False, 0, [], {}, "", MagicMock()])
def test_fields_that_say_nothing_change_nothing(value):
    names = ("prompt_embedding_table", "multimodal_embedding", "py_multimodal_data", "return_context_logits")
    assert Identity.of(FakeRequest(1, [1], **dict.fromkeys(names, value)), Adapters()) == Identity()


@pytest.mark.parametrize("value", [True, 3, [1], {"a": 1}, np.ones(2)])
def test_fields_that_say_something_are_respected(value):
    assert Identity.of(FakeRequest(1, [1], multimodal_embedding=value), Adapters()) is None


def test_hashes_of_earlier_prompts_never_serve_a_prompt_with_other_images():
    """The images are in the hashes, not in the root that earlier hashes are found by."""
    cache, tokens = HashCache(SIZE), list(range(2 * CHUNK_BLOCKS * SIZE))
    images = [(), *((MultimodalItem(name, 9, 6),) for name in (b"cat", b"dog"))]
    found = []
    for items in images:
        known = RequestState.start(Identity(items=items), b"namespace", SIZE, cache)
        known.see_tokens(token_array(tokens))
        found.append(known.hash_through(2 * CHUNK_BLOCKS)[-1])
    assert found == [
        hash_blocks(chain_root(b"namespace"), tokens, SIZE, multimodal=items)[-1] for items in images
    ]
