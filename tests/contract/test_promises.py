"""Rules 3 and 16 of the contract: what is promised is loaded, or the engine stops."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvtier.engine.versions import SchedulerOutput
from kvtier.trtllm import BrokenPromise
from kvtier.trtllm.meta import ConnectorMeta, Save
from tests.trtllm_support import PROMPT, SIZE, FakeRequest, Rig, make_rig, memory_stores


def promised(rig: Rig) -> FakeRequest:
    """Return a request for the prompt that request 1 has saved, promised to it and with pages of its own."""
    request = FakeRequest(2, [*PROMPT, 7])
    assert rig.leader.get_num_new_matched_tokens(request, 0) == (5 * SIZE, False)
    rig.leader.update_state_after_alloc(request, list(range(6, 12)))
    return request


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
    request = promised(rig)
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


def test_a_promise_whose_lease_ran_out_is_renewed_from_what_is_still_there(monkeypatch):
    now = [0.0]
    with memory_stores(monkeypatch, slots=64, clock=lambda: now[0]):
        rig = make_rig()
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = promised(rig)
        now[0] = 1000.0
        rig.iterate(new=[rig.data(request, request.tokens, range(6, 12), 0, 1)])
        assert all(rig.holds(6 + b, (None, PROMPT[: (b + 1) * SIZE])) for b in range(5))


def test_a_promise_that_cannot_be_kept_stops_the_engine(monkeypatch):
    now = [0.0]
    with memory_stores(monkeypatch, slots=5, clock=lambda: now[0]):
        rig = make_rig()
        rig.prefill(FakeRequest(1, [*PROMPT, 7]), range(6))
        request = promised(rig)
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
    request = promised(rig)
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
