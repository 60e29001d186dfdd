"""Heat: bounded, mergeable, independent of nodes' clocks; hostile summaries are left out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3 import heat
from kvtier.tiers.s3.heat import (
    HALF_LIFE_SECONDS,
    HeatLog,
    Use,
    fold_heat,
    load_heat,
    read_heat,
    write_heat,
)
from kvtier.tiers.s3.keys import Keys
from tests.s3_support import NAMESPACE, FakeBucket

KEYS = Keys("p", NAMESPACE.hex)
NOW = 1e9


def block(number: int) -> bytes:
    return number.to_bytes(16, "big")


def bucket_at(now: list[float]) -> FakeBucket:
    bucket = FakeBucket()
    bucket.clock = lambda: now[0]
    return bucket


def test_uses_are_counted_and_dated_by_the_servers_clock() -> None:
    now, mine = [NOW], [5.0]
    bucket = bucket_at(now)
    log = HeatLog(lambda: mine[0])
    assert not log.write(bucket, KEYS, NAMESPACE.id)
    assert bucket.objects == {}
    for _ in range(3):
        log.note(block(1))
    mine[0] += 100
    log.note(block(2))
    mine[0] += 20
    assert log.write(bucket, KEYS, NAMESPACE.id)
    uses, seen = load_heat(bucket, KEYS, NAMESPACE.id)
    assert uses == {block(1): Use(3.0, NOW - 120), block(2): Use(1.0, NOW - 20)}
    assert seen == bucket.keys("heat")
    assert not log.write(bucket, KEYS, NAMESPACE.id)


def test_a_log_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MAX_NOTED", 10)
    log = HeatLog(lambda: 0.0)
    for number in [*range(50), 3]:
        log.note(block(number))
    bucket = bucket_at([NOW])
    log.write(bucket, KEYS, NAMESPACE.id)
    uses, _ = load_heat(bucket, KEYS, NAMESPACE.id)
    assert uses == {block(n): Use(1.0 + (n == 3), NOW) for n in range(10)}


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 10)), min_size=1, max_size=6), st.randoms())
def test_joining_does_not_depend_on_the_order(entries: list[tuple[float, int]], rng: random.Random) -> None:
    uses = [Use(count, NOW - days * HALF_LIFE_SECONDS) for count, days in entries]
    truth = sum(use.count_at(NOW) for use in uses)
    rng.shuffle(uses)
    joined = uses[0]
    for use in uses[1:]:
        joined = joined.joined(use)
    assert joined.last == max(use.last for use in uses)
    assert joined.count_at(NOW) == pytest.approx(truth)


def test_folding_leaves_one_summary_that_says_the_same() -> None:
    now = [NOW]
    bucket = bucket_at(now)
    for node in range(4):
        log = HeatLog(lambda: 0.0)
        for number in range(node, node + 3):
            log.note(block(number))
        log.write(bucket, KEYS, NAMESPACE.id)
        now[0] += 600
    before, seen = load_heat(bucket, KEYS, NAMESPACE.id)
    # One that is written meanwhile is not touched.
    late = HeatLog(lambda: 0.0)
    late.note(block(99))
    late.write(bucket, KEYS, NAMESPACE.id)
    fold_heat(bucket, KEYS, NAMESPACE.id, before, seen)
    assert len(bucket.keys("heat")) == 2
    after, seen = load_heat(bucket, KEYS, NAMESPACE.id)
    assert after.pop(block(99)).count == 1.0
    assert after.keys() == before.keys()
    for key, use in before.items():
        assert after[key].last == pytest.approx(use.last, abs=1)
        assert after[key].count == pytest.approx(use.count, rel=1e-5)
    lonely = bucket.keys("heat")[:1]
    fold_heat(bucket, KEYS, NAMESPACE.id, after, lonely)
    assert lonely[0] in bucket.objects


def test_of_too_many_the_hottest_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat, "MAX_FOLDED", 5)
    uses = {block(n): Use(float(n + 1), NOW) for n in range(20)}
    kept = read_heat(write_heat(uses, NOW, NAMESPACE.id), NOW, NAMESPACE.id)
    assert set(kept) == {block(n) for n in range(15, 20)}


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptBlock):
        read_heat(data, NOW, NAMESPACE.id)


def test_hostile_summaries_are_left_out_and_folded_away() -> None:
    now = [NOW]
    bucket = bucket_at(now)
    good = write_heat({block(1): Use(2.0, NOW)}, NOW, NAMESPACE.id)
    bucket.put(KEYS.new_heat(1), good)
    bucket.put(KEYS.new_heat(2), good[:-1])
    bucket.put(KEYS.new_heat(3), write_heat({block(1): Use(2.0, NOW)}, NOW, b"?" * 16))
    bucket.put(KEYS.new_heat(4), write_heat({block(1): Use(float("nan"), NOW)}, NOW, NAMESPACE.id))
    bucket.put(KEYS.new_heat(5), write_heat({block(1): Use(-5.0, NOW)}, NOW, NAMESPACE.id))
    bucket.put(KEYS.new_heat(6), b"")
    bucket.put(f"{KEYS.heat}readme.txt", b"?")
    uses, seen = load_heat(bucket, KEYS, NAMESPACE.id)
    assert uses == {block(1): Use(2.0, NOW)}
    assert len(seen) == 6
    fold_heat(bucket, KEYS, NAMESPACE.id, uses, seen)
    assert load_heat(bucket, KEYS, NAMESPACE.id)[0] == uses
    assert len(bucket.keys("heat")) == 2


def test_clocks_that_go_back_do_no_harm() -> None:
    kept = read_heat(write_heat({block(1): Use(1.0, NOW + 50)}, NOW, NAMESPACE.id), NOW, NAMESPACE.id)
    assert kept == {block(1): Use(1.0, NOW)}
