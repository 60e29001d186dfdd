"""What is computed sooner than a tier brings it is not fetched, as long as the tier's pace is known."""

from __future__ import annotations

import pytest

from kvtier.codec import BlockCodec
from kvtier.store import staging
from tests.s3_support import eventually
from tests.store_support import LAYOUT, NAMESPACE, DictTier, chain, content, make_store

PATIENT = 20.0
CHEAP = 1e-9


@pytest.fixture
def rig():
    """A store over a tier with two chains, of which one was read a moment ago."""
    tier = DictTier("s3")
    seen, new = chain(4), chain(4, seed=1)
    store = make_store([tier], slots=64)
    codec = BlockCodec(LAYOUT, NAMESPACE.id)
    tier.blocks = {block: bytes(codec.encode(block, content(block))) for block in [*seen, *new]}
    assert len(store.match(seen, PATIENT).slots) == 4
    # A read is over a little after its last block has landed.
    eventually(lambda: store._stager._lanes[0].seen > 0, PATIENT)
    tier.reads.clear()
    yield store, tier, new
    store.close(5)


def test_blocks_that_come_too_late_are_left_where_they_are(rig):
    store, tier, new = rig
    assert store.match(new, 0.0, CHEAP, PATIENT).sources == {}
    assert tier.reads == []
    assert store.stats()["s3_passed_over_blocks"] == 4


def test_blocks_are_fetched_whose_price_is_not_known_or_high(rig):
    store, tier, new = rig
    assert len(store.match(new[:2], PATIENT).slots) == 2
    assert len(store.match(new, PATIENT, PATIENT).slots) == 4
    assert tier.reads == new
    assert store.slot_view(store.match(new).slots[3]) == content(new[3])


def test_a_tier_is_looked_at_again_after_a_while(rig, monkeypatch):
    store, tier, new = rig
    monkeypatch.setattr(staging, "_TRUST_SECONDS", 0.0)
    store.match(new, 0.0, CHEAP, PATIENT)
    assert len(store.match(new, PATIENT).slots) == 4
    assert tier.reads == new
