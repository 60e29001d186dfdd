"""Garbage collection while the server dies, clocks differ, and leases are lost."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest

from kvtier._counters import Counters
from kvtier.errors import KvTierError
from kvtier.tiers.s3 import S3Tier, gc
from kvtier.tiers.s3.lease import Lease, LeaseLost, NoLease
from kvtier.tiers.s3.lifecycle import choose
from kvtier.tiers.s3.open_bucket import open_bucket
from tests.gc_support import collector, grow, hasty, time_between
from tests.s3_support import (
    WINDOW,
    S3Place,
    assert_nothing_wrong,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)

MINUTE = 60 * 10**9


__all__ = ["hasty"]

pytestmark = pytest.mark.usefixtures("hasty")


def test_the_server_dies_while_garbage_is_collected(
    s3_bucket: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL of the server between and in the middle of requests of merges, tombstones and deletions."""
    seed = random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    kept = [chain(2 * WINDOW + 3, size=20_000, seed=10 * seed + number) for number in range(3)]
    stale = [chain(WINDOW + 3, size=20_000, seed=50_000 + 10 * seed + number) for number in range(4)]
    writer = s3_bucket.tier()
    for blocks in stale:
        grow(writer, blocks, WINDOW)
    cutoff = time_between(s3_bucket)
    monkeypatch.setattr(gc, "choose", lambda packs, now, ttl, quota: choose(packs, cutoff, 0.0, quota))
    for blocks in kept:
        grow(writer, blocks, WINDOW, WINDOW + 5, WINDOW + 20, 2 * WINDOW)
    packs = len(s3_bucket.keys("packs"))
    # Any moment may be a moment after the last PUT: what the server has acknowledged it keeps.
    left = threading.Semaphore(0)
    stop = threading.Event()
    failures: list[BaseException] = []

    class Counted:
        """Says when so many requests have been made."""

        def __init__(self) -> None:
            self._bucket = open_bucket(s3_bucket.config(), Counters())

        def __getattr__(self, name: str) -> object:
            left.release()
            return getattr(self._bucket, name)

    def collect() -> None:
        try:
            while not stop.is_set():
                collecting = collector(s3_bucket, Counted(), grace=1.0)  # type: ignore[arg-type]
                with contextlib.suppress(KvTierError):
                    collecting.carry_out(collecting.plan(), NoLease())
        except BaseException as error:
            failures.append(error)
            raise

    thread = threading.Thread(target=collect)
    thread.start()
    try:
        for _ in range(4):
            for _ in range(rng.randrange(5, 60)):
                assert left.acquire(timeout=60)
            s3_bucket.server.restart()
            got = read_all(writer, [block.hash for blocks in kept for block in blocks])
            assert_nothing_wrong(got, [block for blocks in kept for block in blocks])
    finally:
        stop.set()
        thread.join(60)
    assert not failures

    def clean() -> bool:
        with contextlib.suppress(KvTierError):
            collecting = collector(s3_bucket, grace=1.0)
            collecting.carry_out(collecting.plan(), NoLease())
        return len(s3_bucket.keys("packs")) == 3 * len(kept)

    eventually(clean, 90)
    assert len(s3_bucket.keys("packs")) < packs
    reader = s3_bucket.tier()
    for blocks in kept:
        assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    for blocks in stale:
        assert reader.match(hashes_of(blocks)) == 0
    reader.close()
    writer.close()


def test_nodes_whose_clocks_differ(s3_bucket: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By up to a quarter of an hour, which S3 allows: packs are found, condemned, stored anew, all right."""
    seed = random.randrange(1000)
    print("seed", seed)
    rng = random.Random(seed)
    monkeypatch.setattr("kvtier.tiers.s3.compaction.FEWEST_SEGMENTS", 4)
    skews = [0, rng.randrange(-14, 0) * MINUTE, rng.randrange(1, 15) * MINUTE]
    nodes = [s3_bucket.tier(clock=lambda skew=skew: time.time_ns() + skew) for skew in skews]
    chains = [chain(WINDOW + 5, size=2_000, seed=seed * 10 + number) for number in range(4)]
    everything = [block for blocks in chains for block in blocks]
    for _ in range(40):
        blocks, node = rng.choice(chains), rng.choice(nodes)
        what = rng.randrange(4)
        if what == 0:
            node.write(blocks[: rng.randrange(1, len(blocks) + 1)])
            assert node.flush(60)
        elif what == 1:
            run = hashes_of(blocks)[: node.match(hashes_of(blocks))]
            assert_nothing_wrong(read_all(node, run), blocks)
        elif what == 2:
            collecting = collector(s3_bucket, quota=rng.choice([0, 100_000]), grace=rng.choice([0, 0.5]))
            collecting.carry_out(collecting.plan(), NoLease())
        else:
            node.compact_index()

    # What one node stores now, all others find.
    def all_find(node: S3Tier) -> bool:
        node.write(everything)
        assert node.flush(60)
        return all(
            read_all(other, hashes_of(everything)) == payloads_of(everything)
            for other in nodes
            if other.refresh()
        )

    for node in nodes:
        eventually(lambda node=node: all_find(node), 90)
    for node in nodes:
        node.close()


def test_a_lease_that_is_lost_in_the_middle(s3_bucket: S3Place) -> None:
    """Who was held up and overtaken does nothing more, wherever that was; the other one finishes."""
    tier = s3_bucket.tier()
    blocks = chain(WINDOW + 5, size=1_000)
    grow(tier, blocks, WINDOW)
    time.sleep(2.1)
    now = [0.0]
    first = Lease(open_bucket(s3_bucket.config(), Counters()), s3_bucket.prefix, lambda: now[0])
    assert first.acquire()
    bucket = open_bucket(s3_bucket.config(), Counters())
    slow = collector(s3_bucket, bucket, ttl=1.0, grace=0)
    plan = slow.plan(first)
    assert len(plan.verdicts) == 2
    # An hour passes: the lease is not worth a request.
    now[0] += 3600.0
    with pytest.raises(LeaseLost):
        slow.carry_out(plan, first)
    # It thinks that it may renew, but somebody has taken the next number.
    now[0] = 300.0
    [lease] = [item.key for item in bucket.list(f"{s3_bucket.prefix}/gc/")]
    assert bucket.put(f"{lease[:-20]}{int(lease[-20:]) + 1:020d}", b"{}")
    with pytest.raises(LeaseLost):
        slow.carry_out(plan, first)
    assert len(s3_bucket.keys("packs")) == 2
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    # That one is not there any more either, an hour later.
    s3_bucket.delete([item.key for item in bucket.list(f"{s3_bucket.prefix}/gc/")])
    second = Lease(open_bucket(s3_bucket.config(), Counters()), s3_bucket.prefix)
    assert second.acquire()
    fast = collector(s3_bucket, ttl=1.0, grace=0)
    assert fast.carry_out(fast.plan(second), second).deleted == 2
    second.release()
    tier.close()
