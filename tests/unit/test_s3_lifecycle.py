"""What goes from the bucket: by last use, by quota, and never a parent before its children."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.s3.lifecycle import StoredPack, Verdict, choose, spread_use

NOW = 1e9
HOUR = 3600.0
_numbers = itertools.count()


def pack(
    position: int = 0, parent: StoredPack | None = None, age: float = 0.0, size: int = 10, heat: float = 0.0
) -> StoredPack:
    name = next(_numbers).to_bytes(16, "big")
    used = NOW - age
    return StoredPack("n", name, size, position, 1, b"", name, used, used, heat, parent)


def said(verdicts: Sequence[Verdict]) -> list[tuple[StoredPack, str]]:
    return [(verdict.pack, verdict.reason) for verdict in verdicts]


def test_nothing_goes_unless_somebody_asks() -> None:
    packs = [pack(age=1000 * HOUR), pack(position=7, age=1000 * HOUR)]
    spread_use(packs)
    assert choose(packs, NOW) == []


def test_what_was_not_used_for_the_ttl_goes() -> None:
    old, young = pack(age=3 * HOUR), pack(age=HOUR)
    assert said(choose([young, old], NOW, ttl=2 * HOUR)) == [(old, "ttl")]


def test_using_the_end_of_a_chain_keeps_all_of_it() -> None:
    first = pack(age=9 * HOUR, heat=1.0)
    second = pack(1, first, age=8 * HOUR)
    third = pack(2, second, age=HOUR, heat=5.0)
    stale = pack(2, second, age=8 * HOUR)
    spread_use([first, third, second, stale])
    assert said(choose([first, second, third, stale], NOW, ttl=2 * HOUR)) == [(stale, "ttl")]
    assert (first.heat, second.heat) == (6.0, 5.0)


def test_a_quota_takes_the_least_recently_used_and_no_more_than_needed() -> None:
    packs = [pack(age=age * HOUR, size=10) for age in (1, 5, 3, 4, 2)]
    verdicts = choose(packs, NOW, quota=30)
    assert said(verdicts) == [(packs[1], "quota"), (packs[3], "quota")]
    assert choose(packs, NOW, quota=50) == []


def test_children_go_before_their_parents_also_when_as_old() -> None:
    first = pack(age=HOUR)
    second = pack(4, first, age=HOUR)
    third = pack(9, second, age=HOUR)
    assert [v.pack for v in choose([first, second, third], NOW, quota=10)] == [third, second]


def test_what_no_lookup_can_reach_goes_first() -> None:
    reachable = pack(age=9 * HOUR)
    orphan = pack(5, None, age=0.0)
    child = pack(6, orphan, age=0.0)
    packs = [reachable, orphan, child]
    assert said(choose(packs, NOW, quota=10)) == [(child, "orphan"), (orphan, "orphan")]
    assert choose(packs, NOW, ttl=10 * HOUR) == []


def test_superseded_packs_go_whatever_the_settings() -> None:
    short, whole = pack(3, age=0.0), pack(0, age=0.0)
    short.superseded = True
    assert said(choose([whole, short], NOW)) == [(short, "superseded")]
    assert said(choose([whole, short], NOW, quota=10)) == [(short, "superseded")]


def test_a_parent_that_does_not_come_before_its_child_is_none() -> None:
    """Whoever writes to the bucket may claim anything; a circle must not hang or confuse."""
    one, two = pack(5, age=HOUR), pack(5, age=9 * HOUR)
    one.parent, two.parent = two, one
    spread_use([one, two])
    assert two.used == NOW - 9 * HOUR
    assert len(choose([one, two], NOW, quota=1)) == 2


@st.composite
def forests(draw: st.DrawFn) -> list[StoredPack]:
    packs: list[StoredPack] = []
    for _ in range(draw(st.integers(1, 25))):
        parent = draw(st.sampled_from([None, *packs]))
        position = 0 if parent is None else parent.position + draw(st.integers(1, 3))
        if parent is None and draw(st.integers(0, 4)) == 0:
            position = 11
        packs.append(pack(position, parent, draw(st.integers(0, 5)) * HOUR, draw(st.integers(1, 9))))
    return draw(st.permutations(packs))


@given(forests(), st.none() | st.integers(0, 5), st.none() | st.integers(0, 100))
def test_whatever_the_forest(packs: list[StoredPack], ttl: int | None, quota: int | None) -> None:
    spread_use(packs)
    verdicts = choose(packs, NOW, None if ttl is None else ttl * HOUR, quota)
    left = set(packs)
    for verdict in verdicts:
        left.remove(verdict.pack)
        assert all(other.parent is not verdict.pack for other in left)
    if quota is not None:
        assert sum(pack.size for pack in left) <= quota
    if ttl is not None:
        assert all(pack.used >= NOW - ttl * HOUR for pack in left)
    if quota is not None and ttl is None and verdicts:
        assert sum(pack.size for pack in left) + verdicts[-1].pack.size > quota
