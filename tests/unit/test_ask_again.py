"""Lookups that do not wait, and are told for how long it pays to ask again."""

from __future__ import annotations

from tests.s3_support import eventually
from tests.store_support import DictTier, chain, make_store, save


def staged_store(blocks: list[bytes], resident: int) -> tuple[DictTier, object]:
    """Return a slow tier that holds `blocks`, and a store over it with only the first ones in memory."""
    tier = DictTier()
    first = make_store([tier])
    save(first, blocks)
    assert first.flush(10)
    first.close()
    tier.open.clear()
    store = make_store([tier])
    save(store, blocks[:resident])
    return tier, store


def test_a_lookup_says_for_how_long_it_pays_to_ask_again():
    blocks = chain(6)
    tier, store = staged_store(blocks, resident=2)
    answer = store.match(blocks, wait=0.0, ask_again=5.0)
    assert 0.0 < answer.ask_again <= 5.0
    assert (answer.lease, answer.slots) == (0, ())
    assert store.stats()["leases"] == store.stats()["memory_pinned"] == 0
    tier.open.set()
    eventually(lambda: store.match(blocks, wait=0.0, ask_again=5.0).ask_again == 0.0, 10)
    answer = store.match(blocks, wait=0.0, ask_again=5.0)
    assert len(answer.slots) == 6
    store.close()


def test_who_cannot_wait_gets_what_there_is():
    blocks = chain(6)
    tier, store = staged_store(blocks, resident=2)
    answer = store.match(blocks, wait=0.0)
    assert (len(answer.slots), answer.ask_again) == (2, 0.0)
    tier.open.set()
    store.close()


def test_nothing_under_way_is_an_answer():
    tier, store = staged_store(chain(4), resident=4)
    assert store.match(chain(4, seed=1), wait=0.0, ask_again=5.0).ask_again == 0.0
    assert len(store.match(chain(4), wait=0.0, ask_again=5.0).slots) == 4
    tier.open.set()
    store.close()


def test_it_does_not_pay_where_computing_is_faster():
    blocks = chain(6)
    tier, store = staged_store(blocks, resident=2)
    for lane in store._stager._lanes:
        lane.pace.saw(10, 1.0, 2.0)
    assert store.match(blocks, wait=0.0, block_cost=0.001, ask_again=5.0).ask_again == 0.0
    assert store.match(blocks, wait=0.0, block_cost=10.0, ask_again=5.0).ask_again > 0.0
    tier.open.set()
    store.close()
