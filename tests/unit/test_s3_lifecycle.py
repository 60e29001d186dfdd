"""What goes from the bucket: by last use, by quota, and never a parent before its children."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvtier.tiers.s3.lifecycle import PACK, Holdings, Verdict, choose

NOW = 1e9
HOUR = 3600.0
Spec = dict[str, float]


def pack(
    position: int = 0, parent: int = -1, age: float = 0.0, size: int = 10, heat: float = 0.0, **more: float
) -> Spec:
    """Say what a pack is like; `parent` is its parent's place among all."""
    return {"position": position, "parent": parent, "used": NOW - age, "size": size, "heat": heat, **more}


def held(*packs: Spec, namespace: str = "n") -> Holdings:
    rows = np.zeros(len(packs), PACK)
    names = b"".join(number.to_bytes(16, "big") for number in range(len(packs)))
    rows["name"], rows["count"], rows["indexed"] = np.frombuffer(names, "V16"), 1, True
    for row, spec in zip(rows, packs, strict=True):
        for name, value in spec.items():
            row[name] = value
    holdings = Holdings(namespace, rows)
    holdings.spread_use()
    return holdings


def said(verdicts: Iterable[Verdict]) -> list[tuple[int, str]]:
    return [(int.from_bytes(verdict.pack.name, "big"), verdict.reason) for verdict in verdicts]


def test_nothing_goes_unless_somebody_asks() -> None:
    assert choose([held(pack(age=1000 * HOUR), pack(position=7, age=1000 * HOUR))], NOW) == []
    assert choose([held()], NOW, 1.0, 0) == []
    assert choose([], NOW, 1.0, 0) == []


def test_what_was_not_used_for_the_ttl_goes() -> None:
    assert said(choose([held(pack(age=HOUR), pack(age=3 * HOUR))], NOW, ttl=2 * HOUR)) == [(1, "ttl")]


def test_using_the_end_of_a_chain_keeps_all_of_it() -> None:
    holdings = held(
        pack(2, 2, age=HOUR, heat=5.0),
        pack(2, 2, age=8 * HOUR),
        pack(1, 3, age=8 * HOUR),
        pack(age=9 * HOUR, heat=1.0),
    )
    assert said(choose([holdings], NOW, ttl=2 * HOUR)) == [(1, "ttl")]
    assert holdings.rows["heat"].tolist() == [5.0, 0.0, 5.0, 6.0]


def test_a_quota_takes_the_least_recently_used_and_no_more_than_needed() -> None:
    holdings = held(*(pack(age=age * HOUR, size=10) for age in (1, 5, 3, 4, 2)))
    assert said(choose([holdings], NOW, quota=30)) == [(1, "quota"), (3, "quota")]
    assert choose([holdings], NOW, quota=50) == []


def test_ttl_and_quota_together() -> None:
    """What is too old counts as gone for the quota, and goes also below it."""
    holdings = held(*(pack(age=age * HOUR, size=10) for age in (1, 5, 3, 4, 2)))
    assert said(choose([holdings], NOW, 3.5 * HOUR, 20)) == [(1, "ttl"), (3, "ttl"), (2, "quota")]
    assert said(choose([holdings], NOW, 3.5 * HOUR, 45)) == [(1, "ttl"), (3, "ttl")]


def test_namespaces_share_a_quota() -> None:
    first, second = held(pack(age=HOUR), pack(age=3 * HOUR)), held(pack(age=2 * HOUR), namespace="o")
    verdicts = choose([first, second], NOW, quota=10)
    assert [(v.pack.namespace, v.pack.used) for v in verdicts] == [
        ("n", NOW - 3 * HOUR),
        ("o", NOW - 2 * HOUR),
    ]


def test_children_go_before_their_parents_also_when_as_old() -> None:
    holdings = held(pack(age=HOUR), pack(4, 0, age=HOUR), pack(9, 1, age=HOUR))
    assert said(choose([holdings], NOW, quota=10)) == [(2, "quota"), (1, "quota")]


def test_what_no_lookup_can_reach_goes_first() -> None:
    holdings = held(pack(age=9 * HOUR), pack(5, -1, age=0.0), pack(6, 1, age=0.0))
    assert said(choose([holdings], NOW, quota=10)) == [(2, "orphan"), (1, "orphan")]
    assert choose([holdings], NOW, ttl=10 * HOUR) == []


def test_superseded_packs_go_whatever_the_settings() -> None:
    holdings = held(pack(0, age=0.0), pack(3, age=0.0, superseded=True))
    assert said(choose([holdings], NOW)) == [(1, "superseded")]
    assert said(choose([holdings], NOW, quota=10)) == [(1, "superseded")]


def test_buried_packs_are_not_chosen_again_but_their_use_counts() -> None:
    holdings = held(pack(age=9 * HOUR), pack(1, 0, age=HOUR, buried=True, indexed=False))
    assert choose([holdings], NOW, ttl=2 * HOUR, quota=10) == []
    assert said(choose([holdings], NOW, quota=0)) == [(0, "quota")]


def test_a_parent_that_does_not_come_before_its_child_is_none() -> None:
    """Whoever writes to the bucket may claim anything; a circle must not hang or confuse."""
    holdings = held(pack(5, 1, age=HOUR), pack(5, 0, age=9 * HOUR))
    assert holdings.rows["used"].tolist() == [NOW - HOUR, NOW - 9 * HOUR]
    assert len(choose([holdings], NOW, quota=1)) == 2


@st.composite
def forests(draw: st.DrawFn) -> list[Spec]:
    packs: list[Spec] = []
    for _ in range(draw(st.integers(1, 25))):
        parent = draw(st.integers(-1, len(packs) - 1))
        position = 0 if parent < 0 else int(packs[parent]["position"]) + draw(st.integers(1, 3))
        if parent < 0 and draw(st.integers(0, 4)) == 0:
            position = 11
        packs.append(pack(position, parent, draw(st.integers(0, 5)) * HOUR, draw(st.integers(1, 9))))
    order = draw(st.permutations(range(len(packs))))
    places = {old: new for new, old in enumerate(order)}
    return [{**packs[old], "parent": places.get(int(packs[old]["parent"]), -1)} for old in order]


def reference(packs: Sequence[Spec], ttl: float | None, quota: int | None) -> list[tuple[int, str]]:
    """Choose as the definition says, one pack after the other."""
    used = {place: float(packs[place]["used"]) for place in range(len(packs))}
    for place in sorted(used, key=lambda place: -packs[place]["position"]):
        if (parent := int(packs[place]["parent"])) >= 0:
            used[parent] = max(used[parent], used[place])
    rooted: set[int] = set()
    for place in sorted(used, key=lambda place: packs[place]["position"]):
        if packs[place]["position"] == 0 or packs[place]["parent"] in rooted:
            rooted.add(place)
    left = sum(int(spec["size"]) for spec in packs)
    verdicts = []
    for place in sorted(used, key=lambda place: (place in rooted, used[place], -packs[place]["position"])):
        if ttl is not None and used[place] < NOW - ttl:
            verdicts.append((place, "ttl"))
        elif quota is not None and left > quota:
            verdicts.append((place, "quota" if place in rooted else "orphan"))
        else:
            continue
        left -= int(packs[place]["size"])
    return verdicts


@given(forests(), st.none() | st.integers(0, 5), st.none() | st.integers(0, 100))
def test_whatever_the_forest(packs: list[Spec], ttl: int | None, quota: int | None) -> None:
    seconds = None if ttl is None else ttl * HOUR
    verdicts = said(choose([held(*packs)], NOW, seconds, quota))
    assert verdicts == reference(packs, seconds, quota)
    left = set(range(len(packs)))
    for place, _ in verdicts:
        left.remove(place)
        assert all(packs[other]["parent"] != place for other in left)
    if quota is not None:
        assert sum(packs[place]["size"] for place in left) <= quota
