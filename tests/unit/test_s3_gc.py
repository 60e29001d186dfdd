"""Collecting garbage: what goes and what stays, step by step, with a clock that the test sets."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from kvtier.errors import TierUnavailable
from kvtier.tiers.s3.gc import GRACE_SECONDS, Interrupted
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import LeaseLost, NoLease
from kvtier.tiers.s3.pack import read_footer, write_pack
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import write_segments
from kvtier.tiers.s3.survey import LOST_SECONDS
from kvtier.tiers.s3.tombstone import read_tombstone, write_tombstone
from tests.gc_support import HOUR, KEYS, Yard
from tests.s3_support import NAMESPACE, WINDOW, chain, hashes_of


def test_nothing_is_deleted_unless_asked() -> None:
    yard = Yard()
    packs = yard.store_chain(chain(2 * WINDOW + 3), WINDOW, 2 * WINDOW)
    before = dict(yard.bucket.objects)
    for _ in range(3):
        yard.now += 10_000 * HOUR
        yard.collect()
    assert yard.bucket.objects == before
    assert yard.listed() == {pack.name for pack in packs}


def test_an_old_pack_leaves_the_index_first_and_the_bucket_after_the_grace_time() -> None:
    yard = Yard()
    old = yard.store(chain(WINDOW))
    yard.now += 3 * HOUR
    young = yard.store(chain(WINDOW, seed=2))
    done = yard.collect(ttl=2 * HOUR)
    assert (done.condemned, done.deleted) == (1, 0)
    assert yard.there(old)
    assert yard.listed() == {young.name}
    yard.now += GRACE_SECONDS / 2
    assert yard.collect(ttl=2 * HOUR).deleted == 0
    yard.now += GRACE_SECONDS / 2 + 5
    done = yard.collect(ttl=2 * HOUR)
    assert (done.condemned, done.deleted, done.deleted_bytes) == (0, 1, old.size)
    assert not yard.there(old)
    assert yard.there(young)
    assert yard.listed() == {young.name}
    # Once is enough, though its tombstone is still there.
    done = yard.collect(ttl=3 * HOUR)
    assert (done.deleted, done.revived) == (0, 0)


def test_without_grace_both_happen_at_once() -> None:
    yard = Yard()
    old = yard.store(chain(WINDOW))
    yard.now += 3 * HOUR
    assert yard.collect(ttl=HOUR, grace=0).deleted == 1
    assert not yard.there(old)


def test_a_plan_changes_nothing() -> None:
    yard = Yard()
    blocks = chain(WINDOW)
    yard.store_chain(blocks, 3, 9)
    yard.store(chain(WINDOW, seed=4), publish=False)
    yard.use(blocks[-1].hash)
    yard.use(blocks[-1].hash)
    yard.now += 3 * HOUR
    before = dict(yard.bucket.objects)
    plan = yard.plan(ttl=HOUR, quota=1)
    assert plan.verdicts
    assert plan.surveys[NAMESPACE.hex].recovered
    assert yard.bucket.objects == before
    assert {kind for kind, _ in yard.bucket.requests[-len(before) :]} <= {"get", "list"}


def test_use_anywhere_on_a_chain_keeps_what_comes_before() -> None:
    yard = Yard()
    blocks = chain(3 * WINDOW)
    packs = yard.store_chain(blocks, WINDOW, 2 * WINDOW)
    yard.now += 5 * HOUR
    yard.use(blocks[WINDOW + 3].hash)
    plan = yard.plan(ttl=2 * HOUR)
    assert [verdict.pack.name for verdict in plan.verdicts] == [packs[2].name]


def test_a_quota_takes_the_ends_of_the_coldest_chains() -> None:
    yard = Yard()
    chains = [chain(2 * WINDOW, seed=seed, size=500) for seed in range(3)]
    packs = []
    for blocks in chains:
        packs.append(yard.store_chain(blocks, WINDOW))
        yard.now += HOUR
    yard.use(chains[0][-1].hash)
    total = sum(pack.size for pair in packs for pack in pair)
    plan = yard.plan(quota=total - packs[1][1].size - 1)
    assert [(v.pack.name, v.reason) for v in plan.verdicts] == [
        (packs[1][1].name, "quota"),
        (packs[1][0].name, "quota"),
    ]


def test_a_quota_counts_all_namespaces_together() -> None:
    yard = Yard()
    mine = yard.store(chain(WINDOW, size=500))
    yard.now += HOUR
    other = Keys("p", "ab" * 16)
    body, pack = write_pack(chain(WINDOW, seed=3, size=500), bytes.fromhex("ab" * 16))
    yard.bucket.put(other.pack(pack.name), body)
    key = other.new_segment(1)
    [segment] = write_segments(PackTable.of([pack]), bytes.fromhex("ab" * 16))
    yard.bucket.put(key, segment)
    plan = yard.plan(quota=pack.size)
    assert [verdict.pack.name for verdict in plan.verdicts] == [mine.name]
    # What another version wrote, and this one cannot read, still gets old.
    yard.bucket.objects[other.pack(pack.name)] = b"?" * 1000
    del yard.bucket.objects[key]
    yard.now += 3 * HOUR
    plan = yard.plan(ttl=2 * HOUR)
    assert {verdict.pack.namespace for verdict in plan.verdicts} == {NAMESPACE.hex, "ab" * 16}
    yard.collect(ttl=2 * HOUR)
    yard.now += GRACE_SECONDS + 5
    yard.collect(ttl=2 * HOUR)
    assert yard.bucket.keys("packs/") == []


@pytest.mark.parametrize("how", ["used", "listed", "written", "continued"])
def test_what_is_used_after_it_was_condemned_comes_back(how: str) -> None:
    yard = Yard()
    blocks = chain(2 * WINDOW)
    old = yard.store(blocks[:WINDOW])
    yard.now += 3 * HOUR
    yard.collect(ttl=2 * HOUR)
    assert yard.listed() == set()
    if how == "used":
        yard.use(blocks[5].hash)
    elif how == "listed":
        # By somebody who met it as it was being condemned, with a clock that is behind.
        yard.now -= HOUR
        yard.publish(old)
        yard.now += HOUR
        yard.bucket.modified[yard.bucket.keys("index/")[1]] = yard.now
    elif how == "written":
        yard.bucket.modified[KEYS.pack(old.name)] = yard.now
    else:
        yard.store(blocks[WINDOW:])
    yard.now += GRACE_SECONDS + 10
    done = yard.collect(ttl=2 * HOUR)
    assert (done.deleted, done.revived) == (0, 1)
    assert old.name in yard.listed()
    assert yard.there(old)
    # For good: it is one of many again. One that was listed without a use is as old as it was.
    yard.now += 10
    done = yard.collect(ttl=2 * HOUR)
    assert (done.deleted, done.revived, done.condemned) == (0, 0, int(how == "listed"))


def test_the_grace_time_is_the_servers_whatever_the_names_say() -> None:
    """A node whose clock is a day off condemns; the time of grace is not a day longer or shorter."""
    yard = Yard()
    old = yard.store(chain(WINDOW))
    yard.now += 3 * HOUR
    yard.collect(ttl=2 * HOUR)
    [key] = [key for key in yard.bucket.keys("index/") if key.endswith(".kvt")]
    skewed = KEYS.new_tombstone(int((yard.now - 24 * HOUR) * 1e9))
    yard.bucket.objects[skewed] = yard.bucket.objects.pop(key)
    yard.bucket.modified[skewed] = yard.now
    yard.collect(ttl=2 * HOUR)
    assert yard.there(old)


def test_objects_go_children_first_wherever_it_ends() -> None:
    """Also those that were condemned in another order, and by another run."""
    yard = Yard()
    packs = yard.store_chain(chain(3 * WINDOW), WINDOW, 2 * WINDOW)
    yard.now += 3 * HOUR
    for pack in packs:
        yard.bucket.put(
            KEYS.new_tombstone(int(yard.now * 1e9)),
            write_tombstone([pack.name], int(yard.now * 1e9), NAMESPACE.id),
        )
        yard.now += 10
    yard.now += GRACE_SECONDS
    assert [pack.position for pack in yard.plan().doomed] == [2 * WINDOW, WINDOW, 0]


def test_what_is_said_of_a_pack_sorts_after_what_was_said_before_whatever_the_clocks() -> None:
    """A node whose clock is an hour ahead has listed it: what is said now must come after that."""
    yard = Yard()
    old = yard.store(chain(WINDOW), publish=False)
    yard.now += HOUR
    yard.publish(old)
    yard.bucket.modified[yard.bucket.keys("index/")[0]] = yard.now - HOUR
    yard.now -= HOUR - 5
    assert yard.collect(ttl=1.0).condemned == 1
    assert yard.listed() == set()
    # And when it is listed again, that comes after the tombstone.
    yard.now += 5
    yard.use(chain(WINDOW)[3].hash)
    assert yard.collect(ttl=HOUR).revived == 1
    assert yard.listed() == {old.name}


def test_what_was_said_last_holds_whatever_the_clocks() -> None:
    """A tombstone and, behind it by its name, a segment that was written before that look at the bucket."""
    yard = Yard()
    pack = yard.store(chain(WINDOW), publish=False)
    yard.now += 3 * HOUR
    now = int(yard.now * 1e9)
    yard.bucket.put(KEYS.new_tombstone(now), write_tombstone([pack.name], now, NAMESPACE.id))
    yard.now -= HOUR
    [body] = write_segments(PackTable.of([pack]), NAMESPACE.id)
    yard.bucket.put(KEYS.new_segment(now + 1), body)
    yard.now += 2 * HOUR
    plan = yard.plan()
    assert not plan.doomed
    assert not plan.revived
    assert yard.listed() == {pack.name}


def test_packs_that_no_segment_lists_are_found_once_they_are_old_enough() -> None:
    yard = Yard()
    lost = yard.store(chain(WINDOW), publish=False)
    yard.now += LOST_SECONDS / 2
    assert yard.collect().recovered == 0
    yard.now += LOST_SECONDS
    assert yard.collect().recovered == 1
    assert yard.listed() == {lost.name}


def test_packs_that_are_gone_leave_the_index() -> None:
    yard = Yard()
    gone, stays = yard.store(chain(WINDOW)), yard.store(chain(WINDOW, seed=2))
    del yard.bucket.objects[KEYS.pack(gone.name)]
    yard.collect()
    [key] = [key for key in yard.bucket.keys("index/") if key.endswith(".kvt")]
    assert read_tombstone(yard.bucket.objects[key], NAMESPACE.id).names == (gone.name,)
    yard.collect()
    assert len([key for key in yard.bucket.keys("index/") if key.endswith(".kvt")]) == 1
    assert yard.there(stays)


def test_a_lost_lease_or_an_ending_process_stops_it() -> None:
    yard = Yard()
    old = yard.store(chain(WINDOW))
    yard.now += 3 * HOUR
    stop = threading.Event()
    collector = yard.collector(ttl=HOUR, grace=0, stop=stop)
    plan = collector.plan()

    class Lost:
        def keep(self) -> None:
            raise LeaseLost("gone")

    with pytest.raises(LeaseLost):
        collector.carry_out(plan, Lost())
    stop.set()
    with pytest.raises(Interrupted):
        collector.carry_out(plan, NoLease())
    assert yard.there(old)


def dying(rng: random.Random) -> Callable[[str, str], None]:
    left = rng.randrange(1, 60)

    def die(kind: str, key: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise TierUnavailable("dead")

    return die


@pytest.mark.parametrize("seed", range(12))
def test_whoever_dies_anywhere_and_however_many_collect(seed: int) -> None:
    """What is in use stays readable throughout; in the end all that is left is what should be."""
    print("seed", seed)
    rng = random.Random(seed)
    yard = Yard()
    used = chain(3 * WINDOW, size=300, seed=9000 + seed)
    cuts = sorted(rng.sample(range(WINDOW + 1, 2 * WINDOW), 3))
    yard.store_chain(used, WINDOW, *cuts, 2 * WINDOW)
    stale = [chain(WINDOW + 3, size=300, seed=seed * 50 + number) for number in range(6)]
    for blocks in stale:
        yard.store_chain(blocks, WINDOW)

    def check() -> None:
        known: dict[bytes, bytes] = {}
        for name in yard.listed():
            body = yard.bucket.objects[KEYS.pack(name)]
            pack = read_footer(body, len(body), name, NAMESPACE.id, 1 << 20)
            for block, offset, length in zip(pack.hashes, pack.offsets, pack.lengths, strict=True):
                known[block] = body[offset : offset + length]
        for block in used:
            assert known[block.hash] == block.payload

    for _ in range(30):
        yard.now += rng.choice([10.0, 400.0, 1000.0, 4000.0])
        yard.use(used[-1].hash)
        collectors = [yard.collector(ttl=8 * HOUR) for _ in range(rng.choice([1, 1, 2]))]
        plans = [collector.plan() for collector in collectors]
        yard.bucket.before = dying(rng)
        for collector, plan in zip(collectors, plans, strict=True):
            try:
                collector.carry_out(plan, NoLease())
            except TierUnavailable:
                pass
        yard.bucket.before = lambda kind, key: None
        check()
    for _ in range(6):
        yard.now += 3 * HOUR
        yard.use(used[-1].hash)
        yard.collect(ttl=8 * HOUR)
        check()
    wholes = [write_pack(used[at : at + WINDOW], NAMESPACE.id)[1].name for at in range(0, 3 * WINDOW, WINDOW)]
    assert yard.listed() == set(wholes)
    assert set(yard.bucket.keys("packs/")) == {KEYS.pack(name) for name in wholes}
    assert len(yard.bucket.keys("heat/")) == 1
    assert set(hashes_of(used)) & set(hashes_of(stale[0])) == set()


def test_names_that_end_with_zeros_are_told_apart() -> None:
    """Also those that differ in nothing else: numpy drops zeros at the end of what it takes for text."""
    yard = Yard()
    packs = [yard.store(chain(3, seed=seed), publish=False) for seed in range(6)]
    names = [b"a" * 14 + end for end in (b"\0\0", b"\0a", b"a\0", b"\x01\0", b"\xff\0")] + [b"\0" * 16]
    for pack, name in zip(packs, names, strict=True):
        key = KEYS.pack(pack.name)
        yard.bucket.objects[KEYS.pack(name)] = yard.bucket.objects.pop(key)
        yard.bucket.modified[KEYS.pack(name)] = yard.bucket.modified.pop(key)
    yard.now += 2 * LOST_SECONDS
    assert yard.collect().recovered == len(names)
    assert yard.listed() == set(names)
    yard.now += 60
    yard.use(packs[0].hashes[-1])
    assert {verdict.pack.name for verdict in yard.plan(ttl=HOUR).verdicts} == set(names[1:])
    yard.collect(ttl=HOUR)
    yard.now += GRACE_SECONDS + 10
    yard.use(packs[0].hashes[-1])
    assert yard.collect(ttl=2 * HOUR).deleted == len(names) - 1
    assert yard.bucket.keys("packs/") == [KEYS.pack(names[0])]
