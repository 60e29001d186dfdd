"""The lease: one holder at a time, whatever the clocks of the nodes and wherever a holder stops."""

from __future__ import annotations

import threading

import pytest

from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers.s3.lease import TERM_SECONDS, Lease, LeaseLost, NoConditionalPut
from tests.s3_support import FakeBucket


class Times:
    """The server's clock; nodes only have monotonic ones, which run alike."""

    def __init__(self) -> None:
        self.now = 1e9
        self.bucket = FakeBucket()
        self.bucket.clock = lambda: self.now

    def lease(self, behind: float = 0.0) -> Lease:
        return Lease(self.bucket, "p", lambda: self.now - behind)


def test_one_holder_at_a_time() -> None:
    times = Times()
    first, second = times.lease(), times.lease(behind=12345.0)
    assert first.acquire()
    assert not second.acquire()
    first.release()
    assert second.acquire()
    assert not first.acquire()


def test_a_lease_that_is_renewed_stays() -> None:
    times = Times()
    first, second = times.lease(), times.lease()
    assert first.acquire()
    for _ in range(20):
        times.now += TERM_SECONDS / 2
        first.keep()
        assert not second.acquire()
    assert len(times.bucket.keys("gc/lease-")) == 1


def test_a_dead_holder_is_followed_after_the_term() -> None:
    times = Times()
    first, second = times.lease(), times.lease()
    assert first.acquire()
    times.now += TERM_SECONDS
    assert not second.acquire()
    times.now += TERM_SECONDS
    assert second.acquire()
    with pytest.raises(LeaseLost):
        first.keep()
    first.release()
    second.keep()


def test_a_holder_that_slept_does_not_go_on_even_if_nobody_came() -> None:
    times = Times()
    lease = times.lease()
    assert lease.acquire()
    times.now += TERM_SECONDS * 1.01
    with pytest.raises(LeaseLost):
        lease.keep()


def test_a_holder_that_is_overtaken_notices_when_it_renews() -> None:
    times = Times()
    lease = times.lease()
    assert lease.acquire()
    times.now += TERM_SECONDS / 2
    # Another one took it for dead, by a server clock that jumped.
    [key] = times.bucket.keys("gc/lease-")
    times.bucket.put(key[:-1] + str(int(key[-1]) + 1), b"{}")
    with pytest.raises(LeaseLost):
        lease.keep()


@pytest.mark.parametrize("round_", range(5))
def test_of_many_that_try_at_once_one_succeeds(round_: int) -> None:
    times = Times()
    if round_ % 2:
        assert times.lease().acquire()
        times.now += 3 * TERM_SECONDS
    got: list[bool] = []
    start = threading.Barrier(8)

    def attempt() -> None:
        start.wait(30)
        got.append(times.lease().acquire())

    threads = [threading.Thread(target=attempt) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(got) == [False] * 7 + [True]


def test_a_claim_that_comes_late_is_withdrawn() -> None:
    """Held up between looking and writing, while others took, renewed and cleaned up."""
    times = Times()
    assert times.lease().acquire()
    times.now += 3 * TERM_SECONDS
    late = times.lease()

    def meanwhile(kind: str, key: str) -> None:
        if kind == "put":
            times.bucket.before = lambda kind, key: None
            other = times.lease()
            assert other.acquire()
            times.now += TERM_SECONDS / 2
            other.keep()

    times.bucket.before = meanwhile
    assert not late.acquire()
    assert len(times.bucket.keys("gc/lease-")) == 1


def test_two_that_come_in_different_minutes_do_not_both_get_it() -> None:
    """The later one looked before the earlier one wrote, and writes another number, which nobody refuses."""
    times = Times()
    first, second = times.lease(), times.lease()

    def later() -> float:
        # Asked between looking and writing.
        times.bucket.clock = lambda: times.now
        assert first.acquire()
        times.now += 61
        return times.now

    times.bucket.clock = later
    assert not second.acquire()
    assert len(times.bucket.keys("gc/lease-")) == 1
    times.now += TERM_SECONDS / 2
    first.keep()
    assert len(times.bucket.keys("gc/lease-")) == 1


def test_whoever_slept_with_his_machine_finds_that_he_was_followed() -> None:
    """Its clock stood still, the row was empty in between, and somebody else has begun a new one."""
    times = Times()
    asleep = [0.0]
    sleeper = Lease(times.bucket, "p", lambda: asleep[0])
    assert sleeper.acquire()
    times.now += 2 * TERM_SECONDS
    other = times.lease()
    assert other.acquire()
    other.release()
    third = times.lease()
    assert third.acquire()
    asleep[0] += TERM_SECONDS / 2
    with pytest.raises(LeaseLost):
        sleeper.keep()
    times.now += TERM_SECONDS / 2
    third.keep()
    assert len(times.bucket.keys("gc/lease-")) == 1


def test_a_server_that_overwrites_has_no_lease() -> None:
    times = Times()
    times.bucket.conditional = False
    with pytest.raises(NoConditionalPut, match="--no-lease"):
        times.lease().acquire()
    assert times.bucket.objects == {}


def test_credentials_that_may_not_delete_get_none() -> None:
    times = Times()

    def refuse(kind: str, key: str) -> None:
        if kind == "delete":
            raise AccessDenied("no")

    times.bucket.before = refuse
    with pytest.raises(AccessDenied):
        times.lease().acquire()


def test_a_bucket_that_does_not_answer_is_said() -> None:
    times = Times()
    lease = times.lease()
    assert lease.acquire()

    def fail(kind: str, key: str) -> None:
        raise TierUnavailable("gone")

    times.bucket.before = fail
    times.now += TERM_SECONDS / 2
    with pytest.raises(TierUnavailable):
        lease.keep()
    with pytest.raises(TierUnavailable):
        times.lease().acquire()


def test_foreign_objects_do_not_matter() -> None:
    times = Times()
    times.bucket.objects |= {"p/gc/lease-x": b"", "p/gc/lease-99": b"", "p/gc/lease-" + "9" * 21: b""}
    assert times.lease().acquire()
