"""How long a lookup may wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.store.gate import ComputePace, Pace, patience

times = st.floats(0.0, 5.0)
costs = st.floats(1e-4, 1.0)


def test_what_arrives_faster_than_it_is_computed_is_waited_for_whole() -> None:
    arrivals = [0.010 + 0.001 * index for index in range(20)]
    assert arrivals[-1] <= patience(arrivals, 0.05, 0.01) <= 0.05


def test_what_arrives_slower_than_it_is_computed_is_not_waited_for() -> None:
    assert patience([0.010 * (index + 1) for index in range(4)], 0.05, 0.009) == 0.0


def test_the_first_blocks_alone_are_waited_for_when_the_rest_is_slow() -> None:
    assert 0.002 <= patience([0.001, 0.002, 5.0], 10.0, 0.01) <= 0.02


def test_nothing_is_waited_for_that_comes_too_late() -> None:
    assert patience([0.2, 0.3], 0.05, None) == 0.0
    assert patience([0.2, 0.3], 0.05, 10.0) == 0.0
    assert patience([], 0.05, None) == 0.0


def test_whatever_comes_in_time_is_waited_for_while_the_engine_s_speed_is_unknown() -> None:
    assert patience([0.01, 9.0], 0.05, None) == 0.05


def test_blocks_that_are_overdue_are_worth_a_short_wait() -> None:
    assert 0.0 < patience([-0.01, -0.005], 0.05, 0.004) <= 0.05


@given(st.lists(times, max_size=20).map(sorted), times, costs)
def test_a_wait_never_exceeds_what_it_may_be_and_what_it_saves(
    arrivals: list[float], wait: float, cost: float
) -> None:
    seconds = patience(arrivals, wait, cost)
    assert 0.0 <= seconds <= wait
    assert seconds <= len(arrivals) * cost


def test_pace_follows_what_a_tier_delivers() -> None:
    pace = Pace()
    assert pace.arrival(10) == 0.0
    pace.saw(11, 0.1, 0.2)
    assert [pace.arrival(place) for place in (0, 10)] == [pytest.approx(0.1), pytest.approx(0.2)]
    for _ in range(3):
        pace.saw(11, 0.02, 0.03)
    assert [pace.arrival(place) for place in (0, 10)] == [pytest.approx(0.02), pytest.approx(0.03)]


def test_one_read_that_hung_changes_nothing() -> None:
    pace = Pace()
    for first in (0.02, 0.02, 30.0, 0.02):
        pace.saw(1, first, first)
    assert pace.arrival(0) == pytest.approx(0.02)


def test_a_read_of_one_block_says_nothing_about_the_next() -> None:
    pace = Pace()
    pace.saw(11, 0.1, 0.2)
    for _ in range(5):
        pace.saw(1, 0.1, 0.1)
    assert pace.arrival(10) == pytest.approx(0.2)


def test_what_a_block_costs_is_seen_from_the_engine_s_passes() -> None:
    pace = ComputePace()
    assert pace.block_cost(32) is None
    pace.begins(1000, 10.0)
    pace.begins(64, 10.1)
    pace.begins(64, 10.11)
    assert pace.block_cost(32) == pytest.approx(0.0032)


def test_idle_gaps_and_decoding_hardly_change_what_a_block_costs() -> None:
    pace = ComputePace()
    pace.begins(1000, 10.0)
    pace.begins(64, 10.1)
    pace.begins(1000, 11.0)
    pace.begins(64, 500.0)
    assert pace.block_cost(32) == pytest.approx(0.0032, rel=0.1)


def test_an_engine_that_has_become_slower_is_seen_after_some_passes() -> None:
    pace = ComputePace()
    for step in range(50):
        pace.begins(1000, step * (0.1 if step < 10 else 0.2))
    assert pace.block_cost(1) == pytest.approx(0.0002)


def test_a_prompt_alone_costs_what_it_takes_beyond_a_pass_over_nothing():
    pace = ComputePace()
    for tokens, begins, ends in ((1000, 0.0, 0.1), (8, 0.2, 0.23), (1, 0.3, 0.32)):
        pace.begins(tokens, begins)
        pace.begins(0, ends)
    assert pace.block_cost(10) == pytest.approx(0.001)
    assert pace.block_cost(10, alone=100) == pytest.approx(0.0008)
    assert 100 * pace.block_cost(10, alone=100) == pytest.approx(0.1 - 0.02)
    assert 0 < pace.block_cost(10, alone=20) < 1e-6
