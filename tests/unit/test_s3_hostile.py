"""Objects that somebody else has put into the bucket: documents, leases, anything under any key."""

from __future__ import annotations

import random
import secrets
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier._counters import Counters
from kvtier.errors import CorruptBlock, LayoutError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.gc import Collector
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import Lease, NoLease
from kvtier.tiers.s3.namespaces import open_catalog, read_facts
from kvtier.tiers.s3.pack import window_blocks
from kvtier.tiers.s3.upkeep import Upkeep
from kvtier.tiers.s3.verify import Verifier
from tests.gc_support import HOUR, KEYS, Yard
from tests.s3_support import NAMESPACE, WINDOW, FakeBucket, chain

DEEP = b"[" * 900_000


def document(facts: dict[str, Any]) -> tuple[str, bytes]:
    """Write a document that is what it says, and the id that follows from it."""
    namespace = Namespace.from_facts(facts)
    return namespace.hex, namespace.document().encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", DEEP, b'{"a":' * 100_000, b"[]", b'"x"', b"{}", b'{"id": 1}', b"\xff\xfe", b"1" * 100_000],
    ids=range(10),
)
def test_documents_that_are_none(data: bytes) -> None:
    bucket = FakeBucket()
    bucket.objects[KEYS.namespace] = data
    with pytest.raises(CorruptBlock):
        read_facts(bucket, KEYS, NAMESPACE.hex)
    assert Collector(bucket, "p").plan().verdicts == []


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["bfloat16", "flat", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
FIELDS = ["dtype", "tokens_per_block", "layers", "kv_factor", "row_elements", "shards", "kind", "head_dim"]


@given(st.dictionaries(st.sampled_from(FIELDS), values) | values)
def test_a_layout_is_possible_or_refused(layout: Any) -> None:
    sound = {"dtype": "bfloat16", "tokens_per_block": 8, "layers": 2, "kv_factor": 2, "row_elements": 512}
    if isinstance(layout, dict):
        layout = {**sound, **layout}
    try:
        made = BlockLayout(**layout)
    except (LayoutError, TypeError):
        pass
    else:
        assert 1 <= window_blocks(made) <= 1024
        assert 1 <= made.block_bytes <= 1 << 30
    name, data = document({"model": "m", "layout": layout})
    bucket = FakeBucket()
    bucket.objects[Keys("p", name).namespace] = data
    # Whatever it says is the geometry, garbage is collected all the same.
    Collector(bucket, "p").plan()


def test_noise_under_every_kind_of_key() -> None:
    """Nothing but our own errors, and nothing that is sound goes."""
    seed = random.randrange(10_000)
    print("seed", seed)
    rng = random.Random(seed)
    yard = Yard()
    sound = yard.store(chain(WINDOW))
    yard.now += HOUR
    makers = [
        lambda: KEYS.pack(rng.randbytes(16)),
        lambda: KEYS.new_segment(rng.randrange(10**20)),
        lambda: KEYS.new_tombstone(rng.randrange(10**20)),
        lambda: KEYS.new_heat(rng.randrange(10**20)),
        lambda: KEYS.new_compaction(rng.randrange(10**20)),
        lambda: KEYS.namespace,
        lambda: f"p/gc/lease-{rng.randrange(10**20):020d}",
        lambda: f"p/gc/lease-{secrets.token_hex(5)}",
        lambda: f"p/{rng.randbytes(16).hex()}/packs/00/x",
        lambda: f"p/{secrets.token_hex(3)}/packs/{secrets.token_hex(3)}",
    ]
    magics = (b"KVTPACK\n", b"KVTINDX\n", b"KVTGONE\n", b"KVTHEAT\n", b"[", b"")
    for _ in range(300):
        yard.bucket.put(rng.choice(makers)(), rng.choice(magics) + rng.randbytes(rng.randrange(200)))
    yard.now += HOUR
    lease = Lease(yard.bucket, "p")
    lease.acquire()
    collector = yard.collector(ttl=10 * HOUR, quota=10 * sound.size)
    collector.carry_out(collector.plan(), NoLease())
    assert yard.there(sound)
    assert sound.name in yard.listed()
    assert Verifier(yard.bucket, "p", NAMESPACE.hex, lambda size: None).run().damages
    catalog, index = open_catalog(yard.bucket, "p", NAMESPACE.hex, Counters())
    catalog.rebuild()
    catalog.compact()
    catalog.close()
    assert sound.name in index.names()
    assert yard.there(sound)


def test_a_node_goes_on_whatever_a_run_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = Counters()
    upkeep = Upkeep(
        FakeBucket(),
        KEYS,
        "p",
        NAMESPACE.id,
        Health("writing", Breaker(), counters),
        counters,
        ttl=None,
        quota=None,
        window=WINDOW,
    )

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(Collector, "plan", fail)
    with pytest.raises(ZeroDivisionError):
        upkeep.collect()
    monkeypatch.setattr("kvtier.tiers.s3.upkeep.COLLECT_SECONDS", 0.001)
    monkeypatch.setattr("kvtier.tiers.s3.upkeep._JITTER", (1.0, 1.0))
    done: list[int] = []

    def note(*_: object) -> None:
        done.append(1)
        if len(done) == 3:
            upkeep._stop.set()

    monkeypatch.setattr("kvtier.tiers.s3.upkeep.log_once", note)
    upkeep.start()
    upkeep._thread.join(60)
    assert len(done) == 3
    assert counters.snapshot()["gc_failed"] == 3
