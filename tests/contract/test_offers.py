"""Slots are asked for in one pass and used in a later one: what a request has lost by then is not saved.

In rules 10 and 16 of the contract pages change hands without a word; here the store's answers come late, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kvtier.store import Reservation, Run
from kvtier.trtllm import offers
from tests.trtllm_support import PROMPT, SIZE, FakeRequest, Rig

PAGES = list(range(6))


class Later:
    """A reservation that is answered when the test says so, or when somebody waits for it."""

    def __init__(self, granted: Reservation, answers: Answers) -> None:
        self._granted: Reservation | None = granted
        self._answers = answers

    def take(self, wait: bool = False) -> list[int | None] | None:
        if not (wait or self._answers.here) or self._granted is None:
            return None
        granted, self._granted = self._granted, None
        return granted.take()

    def give_up(self) -> None:
        granted, self._granted = self._granted, None
        if granted is not None:
            granted.give_up()


class Answers:
    here = False


@pytest.fixture
def answers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Answers:
    answers, reserve_soon = Answers(), rig.store.reserve_soon

    def ask(runs: Sequence[Run]) -> list[Later]:
        return [Later(granted, answers) for granted in reserve_soon(runs)]

    monkeypatch.setattr(rig.store, "reserve_soon", ask)
    return answers


def step(rig: Rig, request: FakeRequest, token: int) -> None:
    """Let a request generate one more token in a pass of its own."""
    request.tokens.append(token)
    rig.iterate(cached=[rig.data(request, [token], [], len(request.tokens) - 1)])


def saved(rig: Rig) -> float:
    return rig.leader.stats().get("store_saved_blocks", 0)


def test_blocks_are_saved_in_the_pass_after_the_answer(rig, answers):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.prefill(request, PAGES)
    step(rig, request, 8)
    assert saved(rig) == 0
    answers.here = True
    step(rig, request, 9)
    assert saved(rig) == 5
    assert rig.matched([*PROMPT, 1]) == 5 * SIZE
    assert rig.leftovers()["filling"] == 0


@pytest.mark.parametrize("told", [False, True])
def test_nothing_is_saved_from_pages_that_a_paused_request_had(rig, answers, told):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.prefill(request, PAGES)
    answers.here = True
    if told:
        rig.leader.request_reset(request)
    for page in PAGES:
        rig.fill(page, "somebody else's")
    rig.prefill(request, range(10, 16))
    check = FakeRequest(2, [*PROMPT, 1])
    count = rig.prefill(check, range(20, 26)) // SIZE
    assert all(rig.holds(20 + block, (None, PROMPT[: (block + 1) * SIZE])) for block in range(count))
    rig.finish(check, range(20, 26))
    rig.finish(request, range(10, 16))
    assert rig.leftovers() == dict.fromkeys(rig.leftovers(), 0)
    assert rig.matched([*PROMPT, 1]) == 5 * SIZE


def test_a_paused_request_gives_back_what_it_was_not_answered(rig, answers):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.prefill(request, PAGES)
    assert rig.leftovers()["filling"] == 5
    rig.leader.request_reset(request)
    assert rig.leftovers()["filling"] == 0


def test_nor_from_those_that_a_request_had_which_ends_before_it_runs_again(rig, answers):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.prefill(request, PAGES)
    for page in PAGES:
        rig.fill(page, "somebody else's")
    rig.leader.update_state_after_alloc(request, list(range(10, 16)))
    answers.here = True
    rig.finish(request, range(10, 16))
    assert saved(rig) == 0
    assert rig.leftovers() == dict.fromkeys(rig.leftovers(), 0)


def test_a_request_that_ends_waits_for_its_last_slots(rig, answers):
    request = FakeRequest(1, [*PROMPT, 7])
    rig.prefill(request, PAGES)
    request.tokens.append(8)
    assert rig.finish(request, PAGES)
    assert saved(rig) == 5
    assert rig.leftovers() == dict.fromkeys(rig.leftovers(), 0)


def test_what_a_request_was_granted_that_is_never_heard_of_again_is_given_back(rig, answers, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rig.leader._offers, "_clock", lambda: now[0])
    rig.prefill(FakeRequest(1, [*PROMPT, 7]), PAGES)
    assert rig.leftovers()["filling"] == 5
    answers.here = True
    other = FakeRequest(2, [900, 901])
    rig.prefill(other, [20])
    assert rig.leftovers()["filling"] == 5
    now[0] = offers.PATIENCE_SECONDS + 1
    step(rig, other, 902)
    assert rig.leftovers()["filling"] == 0
    assert saved(rig) == 0
