"""Second attempts: which failures get one, after how long, and that they are few."""

from __future__ import annotations

import math

import pytest

from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.bucket import BucketThrottled, BucketTimeout, ConnectionLost, Parts
from kvtier.tiers.s3.retries import Retries


class Source:
    """Fails as it is told, one failure an attempt, and then delivers."""

    def __init__(self, *failures: Exception, size: int = 10) -> None:
        self.failures = list(failures)
        self.pauses: list[float] = []
        self.into = Parts(iter([memoryview(bytearray(size))]), size)
        self.retries = Retries(sleep=self.pauses.append, jitter=lambda: 1.0)

    def receive(self, left: float = math.inf) -> int:
        def attempt() -> None:
            if self.failures:
                raise self.failures.pop(0)
            self.into.advance(len(self.into.room()))

        return self.retries.receive(attempt, self.into, lambda: left)


def test_failures_that_may_pass_are_asked_again_after_a_growing_pause() -> None:
    source = Source(TierUnavailable("500"), BucketThrottled("503"))
    assert source.receive() == 2
    assert source.pauses == [0.1, 0.2]


def test_a_pause_is_as_long_as_the_bucket_asks() -> None:
    source = Source(BucketThrottled("503", 3.0))
    assert source.receive(left=4.0) == 1
    assert source.pauses == [3.0]


@pytest.mark.parametrize(
    "failures",
    [
        [BucketThrottled("503", 5.0)],
        [BucketTimeout("late")],
        [AccessDenied("403")],
        [ConnectionLost("reset"), ConnectionLost("reset")],
        [TierUnavailable("500")] * 3,
    ],
)
def test_what_is_not_worth_another_attempt_is_let_out(failures: list[Exception]) -> None:
    source = Source(*failures)
    with pytest.raises(type(failures[0])):
        source.receive(left=4.0)
    assert source.failures == []


def test_retries_are_one_for_ten_successes_once_the_budget_is_used() -> None:
    source = Source(size=0)
    source.into.left = 1
    attempts = 0

    def failing() -> None:
        nonlocal attempts
        attempts += 1
        raise TierUnavailable("500")

    for _ in range(500):
        with pytest.raises(TierUnavailable):
            source.retries.receive(failing, source.into, lambda: 1.0)
    assert attempts == 510


def test_breaker_opens_when_half_of_the_requests_fail() -> None:
    breaker = Breaker(clock=lambda: 0.0)
    for _ in range(20):
        breaker.success()
    for _ in range(40):
        breaker.failure()
        assert not breaker.is_open or breaker.wait_seconds() > 0
        breaker.success() if not breaker.is_open else None
        if breaker.is_open:
            break
    assert breaker.is_open


def test_breaker_stays_closed_when_one_in_three_fails() -> None:
    breaker = Breaker(clock=lambda: 0.0)
    for _ in range(100):
        breaker.success()
        breaker.success()
        breaker.failure()
    assert not breaker.is_open


def test_breaker_leaves_a_bucket_alone_as_long_as_it_asks() -> None:
    breaker = Breaker(longest=30.0, clock=lambda: 0.0, jitter=lambda: 0.0)
    breaker.failure(pause=7.0)
    assert breaker.wait_seconds() == 7.0
    patient = Breaker(longest=30.0, clock=lambda: 0.0, jitter=lambda: 0.0)
    patient.failure(pause=3600.0)
    assert patient.wait_seconds() == 30.0


def test_parts_are_used_while_the_rest_is_coming() -> None:
    used: list[bytes] = []

    def parts():
        for size in (3, 0, 4):
            part = memoryview(bytearray(size))
            yield part
            used.append(bytes(part))

    into = Parts(parts(), 7)
    data = memoryview(b"abcdefg")
    while into.left:
        room = into.room()[:2]
        room[:] = data[into.done : into.done + len(room)]
        if into.done >= 3:
            assert used == [b"abc", b""]
        into.advance(len(room))
    assert used == [b"abc", b"", b"defg"]
