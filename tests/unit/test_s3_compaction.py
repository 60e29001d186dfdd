"""Compacting index segments: nothing is lost, whoever does it, wherever it stops, whatever lies about."""

from __future__ import annotations

import json
import random
import threading

import pytest

from kvtier._counters import Counters
from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers.s3.compaction import FEWEST_SEGMENTS, GRACE, Compactor
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import read_segment, write_segments
from kvtier.tiers.s3.tombstone import read_tombstone, write_tombstone
from tests.s3_support import NAMESPACE, FakeBucket
from tests.unit.test_index import make_pack

MAX_BLOCK = 1 << 20
HOUR = 3600 * 10**9
START = 500_000 * HOUR
KEYS = Keys("p", NAMESPACE.hex)


class Place:
    """A bucket with small segments in it, and a clock."""

    def __init__(self, segments: int = FEWEST_SEGMENTS + 10) -> None:
        self.bucket = FakeBucket()
        self.now = START
        self.packs = {number: make_pack(number, [10 * number, 10 * number + 1]) for number in range(segments)}
        for number, pack in self.packs.items():
            self.publish(START - HOUR + number * 10**9, pack)

    def bury(self, time_ns: int, *numbers: int) -> str:
        """Write a tombstone of packs."""
        key = KEYS.new_tombstone(time_ns)
        names = [self.packs[number].name for number in numbers]
        self.bucket.objects[key] = write_tombstone(names, time_ns, NAMESPACE.id)
        return key

    def publish(self, time_ns: int, *packs: object) -> str:
        [body] = write_segments(PackTable.of(packs), NAMESPACE.id)
        key = KEYS.new_segment(time_ns)
        self.bucket.objects[key] = body
        return key

    def compactor(self) -> Compactor:
        return Compactor(self.bucket, KEYS, NAMESPACE.id, MAX_BLOCK, Counters(), lambda: self.now)

    def known(self) -> dict[bytes, int]:
        """What a node that starts now would know: each pack and the length of its first block."""
        found = {}
        for key in self.bucket.keys("index"):
            if key.endswith(".kvt"):
                for name in read_tombstone(self.bucket.objects[key], NAMESPACE.id).names:
                    found.pop(name, None)
                continue
            table = read_segment(self.bucket.objects[key], NAMESPACE.id, MAX_BLOCK)
            for place in range(len(table)):
                pack = table.pack(place)
                found[pack.name] = pack.lengths[0]
        return found


def test_small_segments_become_one_and_go_after_the_grace_time() -> None:
    place = Place()
    truth, before = place.known(), place.bucket.keys("index")
    place.compactor().run()
    assert set(before) < set(place.bucket.keys("index"))
    place.now += GRACE // 2
    place.compactor().run()
    assert set(before) < set(place.bucket.keys("index"))
    place.now += GRACE
    place.compactor().run()
    [large] = place.bucket.keys("index")
    assert large not in before
    assert place.known() == truth
    place.now += 2 * GRACE
    place.compactor().run()
    assert place.bucket.keys("compacted") == []


def test_few_and_young_segments_are_left_alone() -> None:
    place = Place(FEWEST_SEGMENTS - 1)
    place.publish(START - 10**9, make_pack(999, [9999]))
    before = dict(place.bucket.objects)
    place.compactor().run()
    assert place.bucket.objects == before


def test_what_is_published_later_still_holds() -> None:
    """The large segment sorts behind what it replaces and before everything newer."""
    place = Place()
    newer = place.publish(START - 60 * 10**9, make_pack(3, [30, 31], length=77))
    place.compactor().run()
    assert place.known()[make_pack(3, [1]).name] == 77
    assert max(place.bucket.keys("index")) == newer


def test_of_two_entries_for_a_pack_the_later_one_is_kept() -> None:
    place = Place()
    place.publish(START - HOUR + HOUR // 2, make_pack(3, [30, 31], length=77))
    for _ in range(2):
        place.compactor().run()
        place.now += 2 * GRACE
    assert len(place.bucket.keys("index")) == 1
    assert place.known()[make_pack(3, [1]).name] == 77


def test_what_tombstones_name_stays_out_and_young_tombstones_stay() -> None:
    """Nodes must not take what is being deleted for packs that nobody has listed."""
    place = Place()
    young = place.bury(START - HOUR // 2, 3, 9)
    back = place.publish(START - HOUR // 4, place.packs[9])
    truth = place.known()
    assert place.packs[3].name not in truth
    for _ in range(2):
        place.compactor().run()
        assert place.known() == truth
        place.now += GRACE + 120 * 10**9
    keys = place.bucket.keys("index")
    assert young in keys
    assert back not in keys
    assert len(keys) == 2


def test_old_tombstones_go_with_all_that_they_speak_of(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place()
    place.compactor().run()
    place.now += 2 * GRACE
    place.compactor().run()
    [large] = place.bucket.keys("index")
    monkeypatch.setattr("kvtier.tiers.s3.compaction.SMALL_BYTES", len(place.bucket.objects[large]) - 1)
    place.bury(place.now, 3, 9)
    for number in range(FEWEST_SEGMENTS):
        place.publish(place.now + number * 10**9, make_pack(1000 + number, [20_000 + number]))
    truth = place.known()
    place.now += 5 * GRACE
    for _ in range(2):
        place.compactor().run()
        assert place.known() == truth
        place.now += 2 * GRACE
    [key] = place.bucket.keys("index")
    assert key.endswith(".kvi")
    assert place.packs[3].name not in place.known()


@pytest.mark.parametrize("conditional", [True, False])
def test_nodes_that_compact_at_once_lose_nothing(conditional: bool) -> None:
    place = Place()
    place.bucket.conditional = conditional
    truth = place.known()
    for _ in range(4):
        nodes = [threading.Thread(target=place.compactor().run) for _ in range(4)]
        for node in nodes:
            node.start()
        for node in nodes:
            node.join()
        assert place.known() == truth
        place.now += 2 * GRACE
    assert len(place.bucket.keys("index")) <= (1 if conditional else 4)


@pytest.mark.parametrize("seed", range(10))
def test_nodes_that_die_anywhere_lose_nothing(seed: int) -> None:
    print("seed", seed)
    rng = random.Random(seed)
    place = Place()
    truth = place.known()
    for _ in range(12):
        left = rng.randrange(1, 200)

        def die(kind: str, key: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise TierUnavailable("dead")

        place.bucket.before = die
        try:
            place.compactor().run()
        except TierUnavailable:
            pass
        place.bucket.before = lambda kind, key: None
        assert place.known() == truth
        place.now += rng.choice([GRACE // 2, GRACE, 2 * GRACE])
    for _ in range(3):
        place.compactor().run()
        place.now += 2 * GRACE
    assert place.known() == truth
    assert len(place.bucket.keys("index")) < FEWEST_SEGMENTS


def test_small_segments_stay_when_the_large_one_is_spoilt() -> None:
    place = Place()
    truth, before = place.known(), place.bucket.keys("index")
    place.compactor().run()
    [large] = set(place.bucket.keys("index")) - set(before)
    body = place.bucket.objects.pop(large)
    place.bucket.objects[large] = body[:-1]
    place.now += 2 * GRACE
    place.compactor().run()
    assert set(before) <= set(place.bucket.keys("index"))
    place.bucket.objects.pop(large)
    assert place.known() == truth


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"not json",
        b"[]",
        b"[" * 500_000,
        b'{"large": 1, "small": 2}',
        b'{"large": [[1]], "small": [{}]}',
        json.dumps({"large": [], "small": [KEYS.new_segment(1)]}).encode(),
        json.dumps({"large": [KEYS.new_segment(1)], "small": ["p/somebody/else", KEYS.namespace]}).encode(),
        json.dumps({"large": ["x"], "small": [7]}).encode(),
    ],
)
def test_hostile_records_delete_nothing(record: bytes) -> None:
    place = Place(3)
    place.bucket.objects |= {"p/somebody/else": b"1", KEYS.namespace: b"{}"}
    before = set(place.bucket.objects)
    place.bucket.objects[KEYS.new_compaction(START - 2 * HOUR)] = record
    place.compactor().run()
    assert set(place.bucket.objects) == before


def test_credentials_that_may_not_delete_only_leave_segments() -> None:
    place = Place()
    truth = place.known()

    def refuse(kind: str, key: str) -> None:
        if kind == "delete":
            raise AccessDenied("no")

    place.bucket.before = refuse
    for _ in range(3):
        place.compactor().run()
        place.now += 2 * GRACE
    assert place.known() == truth
