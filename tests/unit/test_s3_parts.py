"""The parts of the S3 tier that need no server: breaker, packer, ranges, thread pool."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.layout import BlockLayout
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.index import Location
from kvtier.tiers.s3.pack import Pack, window_blocks
from kvtier.tiers.s3.packer import Packer
from kvtier.tiers.s3.reader import MAX_GAP_BYTES, RANGE_BYTES, plan_ranges

WINDOW = 8


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_breaker(clock: Clock, longest: float = 30.0) -> Breaker:
    return Breaker(longest, clock=clock, jitter=lambda: 0.0)


def test_breaker_opens_after_three_failures_in_a_row() -> None:
    breaker = make_breaker(Clock())
    for outcome in (breaker.failure, breaker.failure, breaker.success, breaker.failure, breaker.failure):
        outcome()
        assert not breaker.is_open
    breaker.failure()
    assert breaker.is_open


def test_breaker_lets_one_probe_through_and_doubles_its_pause() -> None:
    clock = Clock()
    breaker = make_breaker(clock)
    for _ in range(3):
        breaker.failure()
    pauses = []
    for _ in range(9):
        assert not breaker.try_enter()
        pauses.append(breaker.wait_seconds())
        clock.now += pauses[-1]
        assert breaker.try_enter()
        assert not breaker.try_enter()
        assert breaker.is_open
        breaker.failure()
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    clock.now += breaker.wait_seconds()
    assert breaker.try_enter()
    breaker.success()
    assert not breaker.is_open
    assert breaker.try_enter()
    for _ in range(3):
        breaker.failure()
    assert breaker.wait_seconds() == 0.5


def test_breaker_ignores_the_late_ends_of_requests_from_before() -> None:
    breaker = make_breaker(Clock())
    for _ in range(40):
        breaker.failure()
    assert breaker.wait_seconds() == 0.5


def test_breaker_opens_longest_at_the_first_refusal() -> None:
    breaker = make_breaker(Clock())
    breaker.failure(denied=True)
    assert breaker.is_open
    assert breaker.wait_seconds() == 30


def test_breaker_grants_another_probe_if_one_never_reports_back() -> None:
    clock = Clock()
    breaker = make_breaker(clock)
    for _ in range(3):
        breaker.failure()
    clock.now += breaker.wait_seconds()
    assert breaker.try_enter()
    clock.now += breaker.wait_seconds()
    assert breaker.try_enter()


def test_breaker_says_when_it_opens() -> None:
    opened = []
    breaker = Breaker(on_open=lambda: opened.append(1))
    for _ in range(5):
        breaker.failure()
    assert opened == [1]


def block(name: str, parent: str, position: int) -> StoredBlock:
    return StoredBlock(name.encode(), parent.encode(), position, b"")


class Feed:
    """A packer and everything that it has been given and has given back."""

    def __init__(self, window: int = WINDOW) -> None:
        self.given: set[bytes] = set()
        self.packs: list[list[StoredBlock]] = []
        self.packer = Packer(window, self.given.__contains__)

    def add(self, *blocks: StoredBlock, now: float = 0.0) -> None:
        for item in blocks:
            self.given.add(item.hash)
            done = self.packer.add(item, now)
            if done is not None:
                self.packs.append(done)

    def names(self) -> list[str]:
        return [" ".join(item.hash.decode() for item in pack) for pack in self.packs]


def line(name: str, start: int, end: int, parent: str | None = None) -> list[StoredBlock]:
    blocks = []
    for position in range(start, end):
        before = parent if position == start and parent is not None else f"{name}{position - 1}"
        blocks.append(block(f"{name}{position}", before, position))
    return blocks


def test_windows_end_at_fixed_positions() -> None:
    feed = Feed(4)
    feed.add(*line("a", 0, 10))
    assert feed.names() == ["a0 a1 a2 a3", "a4 a5 a6 a7"]
    assert [[b.hash for b in rest] for rest in feed.packer.take_due(0.0, 0.0)] == [[b"a8", b"a9"]]
    assert not feed.packer


def test_a_window_whose_front_is_stored_elsewhere_is_complete_with_its_end() -> None:
    feed = Feed(4)
    feed.given.add(b"a1")
    feed.add(*line("a", 2, 4))
    assert feed.names() == ["a2 a3"]


def test_a_window_whose_front_is_still_to_come_waits_for_it() -> None:
    feed = Feed(4)
    feed.add(*line("a", 2, 4))
    assert feed.names() == []
    feed.add(*line("a", 0, 2))
    assert feed.names() == ["a0 a1 a2 a3"]


def test_chains_that_part_within_a_window_make_a_pack_each() -> None:
    feed = Feed(4)
    feed.add(*line("a", 0, 2))
    feed.add(block("b2", "a1", 2))
    feed.add(block("c2", "a1", 2))
    feed.add(block("c3", "c2", 3))
    feed.add(block("b3", "b2", 3))
    assert feed.names() == ["c2 c3", "a0 a1 b2 b3"]


def test_only_windows_that_nothing_came_for_are_due() -> None:
    feed = Feed(4)
    feed.add(*line("a", 0, 2), now=1.0)
    feed.add(*line("b", 0, 2), now=1.0)
    feed.add(*line("b", 2, 3), now=2.0)
    assert feed.packer.next_due(5.0) == 6.0
    assert [pack[0].hash for pack in feed.packer.take_due(6.5, 5.0)] == [b"a0"]
    assert feed.packer.next_due(5.0) == 7.0


def test_a_window_that_grows_for_ever_is_due_some_time() -> None:
    """Generation completes a block now and then: its window waits, but not without end."""
    feed = Feed(1024)
    for place, item in enumerate(line("a", 0, 100)):
        feed.add(item, now=float(place))
    assert feed.packer.next_due(5.0) == 60.0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_whatever_the_order_every_block_lands_in_one_pack(seed: int) -> None:
    rng = random.Random(seed)
    tree = line("a", 0, rng.randint(1, 3 * WINDOW))
    for branch in "bcd":
        fork = rng.choice(tree)
        tree += line(
            branch, fork.position + 1, fork.position + rng.randint(2, 2 * WINDOW), fork.hash.decode()
        )
    by_hash = {item.hash: item for item in tree}
    order = rng.sample(tree, len(tree)) if rng.random() < 0.5 else tree
    feed = Feed()
    feed.add(*order)
    packs = feed.packs + feed.packer.take_due(0.0, 0.0)
    assert sorted(item.hash for pack in packs for item in pack) == sorted(by_hash)
    for pack in packs:
        assert [by_hash[item.parent] for item in pack[1:]] == pack[:-1]
        assert len({item.position // WINDOW for item in pack}) == 1
    if order is tree:
        # Replicas cut alike: the trunk, in order, is cut into whole windows.
        trunk = [pack for pack in packs if pack[0].hash.startswith(b"a")]
        assert {pack[0].position % WINDOW for pack in trunk} == {0}


def pack_of(name: int, lengths: list[int], gaps: list[int] | None = None) -> Pack:
    offsets, at = array("Q"), 16
    for place, length in enumerate(lengths):
        at += gaps[place] if gaps else 0
        offsets.append(at)
        at += length
    hashes = tuple(bytes([name, place]) for place in range(len(lengths)))
    return Pack(bytes([name]), at, b"", 0, hashes, offsets, array("I", lengths))


def places(pack: Pack) -> list[Location]:
    return [
        Location(block_hash, pack, offset, length)
        for block_hash, offset, length in zip(pack.hashes, pack.offsets, pack.lengths, strict=True)
    ]


def test_neighbours_share_a_range_and_distant_blocks_do_not() -> None:
    near, far = MAX_GAP_BYTES, MAX_GAP_BYTES + 1
    plans = plan_ranges(places(pack_of(1, [10] * 4, gaps=[0, near, far, 0])), 8)
    assert [[place.hash[1] for place in plan.blocks] for plan in plans] == [[0, 1], [2, 3]]
    assert [(plan.offset, plan.length) for plan in plans] == [(16, 20 + near), (36 + near + far, 20)]


def test_ranges_are_as_many_as_the_connections_but_not_small() -> None:
    mib = 1 << 20
    wanted = places(pack_of(1, [6 * mib] * 5)) + places(pack_of(2, [40 * mib, mib]))
    assert [plan.length // mib for plan in plan_ranges(wanted, 5)] == [12, 12, 6, 40, 1]
    assert [plan.length // mib for plan in plan_ranges(wanted, 1)] == [30, 41]
    assert [plan.length // mib for plan in plan_ranges(wanted, 1000)] == [6] * 5 + [40, 1]


@pytest.mark.parametrize(("tokens", "fewest", "most"), [(65_536, 64, 70), (8_192, 32, 40), (1_024, 8, 16)])
def test_requests_for_prefixes_of_an_8b_model(tokens: int, fewest: int, most: int) -> None:
    """The whole prefix costs a request a pack, a short one uses the connections."""
    layout = BlockLayout("bfloat16", tokens_per_block=32, layers=32, kv_factor=2, row_elements=32 * 1024)
    assert layout.block_bytes == 32 * 131_072
    window = window_blocks(layout)
    packs = [
        pack_of(number, [int(layout.block_bytes / 1.47)] * window)
        for number in range(tokens // layout.tokens_per_block // window)
    ]
    plans = plan_ranges([place for pack in packs for place in places(pack)], 32)
    assert fewest <= len(plans) <= most


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(0, 3 * MAX_GAP_BYTES), st.integers(1, 2 * RANGE_BYTES[0])),
            min_size=1,
            max_size=9,
        ),
        min_size=1,
        max_size=3,
    ),
    st.randoms(use_true_random=False),
)
def test_plans_cover_each_block_once(shapes: list[list[tuple[int, int]]], rng: random.Random) -> None:
    packs = [pack_of(n, [s[1] for s in shape], [s[0] for s in shape]) for n, shape in enumerate(shapes)]
    wanted = [place for pack in packs for place in places(pack)]
    rng.shuffle(wanted)
    connections = rng.randint(1, 40)
    plans = plan_ranges(wanted, connections)
    assert sorted(place.hash for plan in plans for place in plan.blocks) == sorted(
        place.hash for place in wanted
    )
    assert plans[0].pack is wanted[0].pack
    for plan in plans:
        for place in plan.blocks:
            assert place.pack is plan.pack
            assert plan.offset <= place.offset
            assert place.offset + place.length <= plan.offset + plan.length
        total = sum(place.length for place in wanted)
        assert plan.length <= max(RANGE_BYTES[0], total // connections) or len(plan.blocks) == 1
