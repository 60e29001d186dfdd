"""Collecting garbage on a real S3 server: beside readers and writers, killed anywhere, twice at once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import pytest

from kvtier._counters import Counters
from kvtier.errors import CorruptBlock
from kvtier.tiers.s3 import gc
from kvtier.tiers.s3.gc import Collector
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import Lease, NoLease
from kvtier.tiers.s3.lifecycle import choose
from kvtier.tiers.s3.open_bucket import open_bucket
from kvtier.tiers.s3.pack import read_footer
from tests.faults.s3_proxy import FaultyProxy
from tests.gc_support import collector, grow, hasty, time_between
from tests.s3_support import (
    MAX_BYTES,
    NAMESPACE,
    WINDOW,
    S3Place,
    assert_nothing_wrong,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)

__all__ = ["hasty"]


@pytest.mark.usefixtures("hasty")
def test_beside_readers_and_writers_every_byte_is_right(s3_bucket: S3Place) -> None:
    """Everything is too old and too much, all the time; what is read is right or a miss, and comes back."""
    seed = random.randrange(1000)
    print("seed", seed)
    chains = [chain(2 * WINDOW + 5, size=3_000, seed=seed + number) for number in range(6)]
    everything = [block for blocks in chains for block in blocks]
    nodes = [s3_bucket.tier() for _ in range(3)]
    stop = threading.Event()
    failures: list[BaseException] = []
    reads: Counter[bool] = Counter()
    done: Counter[str] = Counter()

    def guarded(work: Callable[[random.Random], None]) -> threading.Thread:
        rng = random.Random(f"{seed}{len(threads)}")

        def loop() -> None:
            try:
                while not stop.is_set():
                    work(rng)
            except BaseException as error:
                failures.append(error)
                raise

        return threading.Thread(target=loop)

    def write(rng: random.Random) -> None:
        blocks = rng.choice(chains)
        node = rng.choice(nodes)
        node.write(blocks[: rng.randrange(1, len(blocks) + 1)])
        node.flush(30)

    def read(rng: random.Random) -> None:
        blocks, node = rng.choice(chains), rng.choice(nodes)
        run = hashes_of(blocks)[: node.match(hashes_of(blocks))]
        got = read_all(node, run)
        assert_nothing_wrong(got, blocks)
        reads.update(payload is not None for payload in got.values())

    def collect(rng: random.Random) -> None:
        collecting = collector(
            s3_bucket, ttl=rng.choice([None, 2.0]), quota=200_000, grace=rng.choice([0, 1])
        )
        result = collecting.carry_out(collecting.plan(), NoLease())
        done.update(deleted=result.deleted, merged=result.merged, revived=result.revived)

    threads: list[threading.Thread] = []
    for work in (write, write, read, read, collect, collect):
        threads.append(guarded(work))
    for thread in threads:
        thread.start()
    eventually(lambda: (done["deleted"] > 30 and reads[True] > 500) or failures)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not failures
    print(dict(reads), dict(done))

    # A node that believes in a pack that is gone learns better by reading it, and stores it anew.
    def all_there() -> bool:
        nodes[0].write(everything)
        assert nodes[0].flush(60)
        got = read_all(nodes[0], hashes_of(everything))
        assert_nothing_wrong(got, everything)
        return None not in got.values()

    eventually(all_there)
    assert nodes[0].flush(60)
    for node in nodes:
        node.close()
    fresh = s3_bucket.tier()
    got = read_all(fresh, hashes_of(everything))
    assert_nothing_wrong(got, everything)
    fresh.close()


_CHILD = """
import json, sys, time
from kvtier._counters import Counters
from kvtier.errors import CorruptBlock
from kvtier.config import S3Config
from kvtier.tiers.s3 import gc, merge, survey
from kvtier.tiers.s3.lease import NoLease
from kvtier.tiers.s3.open_bucket import open_bucket
survey.SETTLED_SECONDS = merge.SETTLED_SECONDS = 1.0
survey.LOST_SECONDS = 4.0
order = json.loads(sys.argv[1])
gc.choose = lambda packs, now, ttl, quota, choose=gc.choose: choose(packs, order["cutoff"], 0.0, quota)
bucket = open_bucket(S3Config(**order["config"]), Counters())
for kind in ("put", "delete"):
    def slow(key, *body, call=getattr(bucket, kind), kind=kind):
        print(kind, key, flush=True)
        result = call(key, *body)
        print("done", kind, key, flush=True)
        return result
    setattr(bucket, kind, slow)
while True:
    collector = gc.Collector(
        bucket, order["config"]["prefix"], grace=1.0, windows=order["windows"],
        verify=lambda payload, block_hash, namespace: None,
    )
    collector.carry_out(collector.plan(), NoLease())
    print("round", flush=True)
"""


def contents(place: S3Place) -> set[tuple[bytes, ...]]:
    """Return the blocks of each pack.

    What a server keeps of a PUT that broke off is none: it is found damaged once it is an hour old.
    """
    keys, packs = Keys(place.prefix, NAMESPACE.hex), set()
    for key in place.keys("packs"):
        body, name = place.get(key), keys.pack_name(key)
        assert name is not None
        try:
            packs.add(read_footer(body, len(body), name, NAMESPACE.id, MAX_BYTES).hashes)
        except CorruptBlock as error:
            print(f"broken off: {key}, {len(body)} bytes: {error}")
    return packs


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_in_the_middle_of_it(s3_bucket: S3Place, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL between any two requests, of merges and deletions alike: the next one goes on.

    What was last used before a certain moment is too old, however long the test takes.
    """
    print("seed", seed)
    rng = random.Random(seed)
    kept = [chain(2 * WINDOW + 3, size=2_000, seed=10 * seed + number) for number in range(2)]
    stale = [chain(WINDOW + 3, size=2_000, seed=5000 + 10 * seed + number) for number in range(4)]
    writer = s3_bucket.tier()
    for blocks in stale:
        grow(writer, blocks, WINDOW)
    cutoff = time_between(s3_bucket)
    for blocks in kept:
        grow(writer, blocks, WINDOW, WINDOW + 5, WINDOW + 20, 2 * WINDOW)
    config = s3_bucket.config().model_dump(mode="json")
    order = {"config": config, "cutoff": cutoff, "windows": {NAMESPACE.hex: WINDOW}}
    seen: Counter[str] = Counter()
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(order)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        left = rng.randrange(1, 25)
        for line in child.stdout:
            # Lines of several threads may run into each other.
            kind = "".join(line.split()[:1])
            seen[f"{kind} packs" if "/packs/" in line else kind] += 1
            left -= 4 if line.startswith("round") else 1
            if left <= 0:
                break
        child.kill()
        child.wait()
        child.stdout.close()
        reader = s3_bucket.tier()
        for blocks in kept:
            assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
        reader.close()
    print(dict(seen))
    # What is in use is whole and merged, and nothing else is left.
    wanted = {
        tuple(hashes_of(blocks[start:end]))
        for blocks in kept
        for start, end in ((0, WINDOW), (WINDOW, 2 * WINDOW), (2 * WINDOW, len(blocks)))
    }
    monkeypatch.setattr(gc, "choose", lambda packs, now, ttl, quota: choose(packs, cutoff, 0.0, quota))

    def clean() -> bool:
        collecting = collector(s3_bucket, grace=1.0)
        collecting.carry_out(collecting.plan(), NoLease())
        return contents(s3_bucket) == wanted

    eventually(clean, 90)
    reader = s3_bucket.tier()
    for blocks in kept:
        assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    for blocks in stale:
        assert reader.match(hashes_of(blocks)) == 0
    reader.close()
    writer.close()


def test_two_at_once_only_one_of_which_collects(s3_bucket: S3Place) -> None:
    tier = s3_bucket.tier()
    blocks = chain(3 * WINDOW, size=1_000)
    tier.write(blocks)
    assert tier.flush(60)
    time.sleep(2)
    start = threading.Barrier(3)
    got: list[object] = []

    def collect() -> None:
        bucket = open_bucket(s3_bucket.config(), Counters())
        lease = Lease(bucket, s3_bucket.prefix)
        start.wait(30)
        if lease.acquire():
            collecting = Collector(bucket, s3_bucket.prefix, ttl=1.0, grace=0)
            got.append(collecting.carry_out(collecting.plan(lease), lease))
            # Held until the others have tried.
            start.wait(30)
            lease.release()
        else:
            got.append(None)
            start.wait(30)

    threads = [threading.Thread(target=collect) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    results = [result for result in got if result is not None]
    assert len(got) == 3
    assert len(results) == 1
    assert s3_bucket.keys("packs") == []
    leases = f"{s3_bucket.prefix}/gc/"
    assert list(open_bucket(s3_bucket.config(), Counters()).list(leases)) == []
    tier.close()


def test_a_tier_collects_and_notes_uses_by_itself(
    s3_bucket: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.tiers.s3.upkeep.HEAT_SECONDS", 0.3)
    blocks, other = chain(WINDOW, size=40_000), chain(WINDOW, size=40_000, seed=2)
    user = s3_bucket.tier()
    for some in (blocks, other):
        user.write(some)
        assert user.flush(60)
    # Times in listings are whole seconds.
    time.sleep(2.1)
    user.note_use(blocks[-1].hash)
    eventually(lambda: user.stats().get("heat_summaries_written"))
    monkeypatch.setattr("kvtier.tiers.s3.upkeep.COLLECT_SECONDS", 0.5)
    tender = s3_bucket.tier(config=s3_bucket.config(quota=2 << 20))
    eventually(lambda: user.match(hashes_of(other)) == 0)
    # The least recently used one went, and no more than the quota wants.
    assert user.match(hashes_of(blocks)) == WINDOW
    assert read_all(user, hashes_of(blocks)) == payloads_of(blocks)
    eventually(lambda: tender.stats().get("gc_condemned_packs") == 1)
    user.close()
    tender.close()


def test_what_collecting_and_heat_cost_and_lookups_do_not(
    s3_bucket: S3Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lookup, hit or miss, makes no request, whatever tombstones there are; a use costs none either."""
    counts: Counter[str] = Counter()

    def count(method: str, path: str, headers: dict[str, str]) -> None:
        counts["LIST" if "list-type" in path else method] += 1

    writer = s3_bucket.tier()
    blocks, old = chain(WINDOW, size=1_000), chain(WINDOW, size=1_000, seed=2)
    for some in (old, blocks):
        writer.write(some)
        assert writer.flush(60)
    cutoff = time_between(s3_bucket)
    monkeypatch.setattr(gc, "choose", lambda packs, now, ttl, quota: choose(packs, cutoff, 0.0, quota))
    with FaultyProxy(s3_bucket.server.endpoint) as proxy:
        proxy.choose = count
        config = s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600)
        collecting = Collector(open_bucket(config, Counters()), s3_bucket.prefix)
        lease = Lease(open_bucket(config, Counters()), s3_bucket.prefix)
        assert lease.acquire()
        writer.note_use(blocks[-1].hash)
        writer._upkeep.write_heat()
        collecting.carry_out(collecting.plan(lease), lease)
        lease.release()
        # Lease: 2 lists, 2 PUTs (the second is refused), 2 DELETEs. Namespaces: 3 lists. Then index,
        # packs and heat; two segments and a summary are read, the document for the geometry, one tombstone.
        assert counts["LIST"] <= 8
        assert counts["PUT"] == 3
        assert counts["DELETE"] == 2
        assert counts["GET"] <= 4
        assert set(counts) <= {"LIST", "PUT", "DELETE", "GET"}

        reader = s3_bucket.tier(config=config)
        counts.clear()
        assert reader.match(hashes_of(blocks)) == WINDOW
        assert reader.match(hashes_of(old)) == 0
        assert read_all(reader, hashes_of(old)) == dict.fromkeys(hashes_of(old))
        for block in hashes_of(blocks):
            reader.note_use(block)
        assert not counts
        reader.close()
        # At its end it leaves one summary.
        assert counts == {"PUT": 1}
    writer.close()
