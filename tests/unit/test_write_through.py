"""Write-through: a prompt that disk or bucket take more slowly than it is encoded gets there whole."""

from __future__ import annotations

import threading
import time

import pytest

from kvtier.store import writing
from tests.store_support import DictTier, chain, make_store, save

PATIENT = 30.0


class SlowTier(DictTier):
    """A tier that writes a batch for each `release` of its gate."""

    def __init__(self) -> None:
        super().__init__("disk")
        self.gate = threading.Semaphore(0)
        self.most = 0
        self.begun = threading.Event()

    def write(self, blocks):
        self.begun.set()
        assert self.gate.acquire(timeout=PATIENT)
        self.most = max(self.most, len(blocks))
        return super().write(blocks)


@pytest.fixture
def full(monkeypatch):
    """A store of 64 slots whose tier is writing one block, and has room for three in its queue."""
    tier = SlowTier()
    store = make_store([tier], slots=64)
    save(store, chain(1, 100))
    assert tier.begun.wait(PATIENT)
    size = store.stats()["queued_bytes"]
    monkeypatch.setattr(writing, "MAX_QUEUED_BYTES", 3 * size)
    yield store, tier
    tier.gate.release(1000)
    store.close(5)


def until(condition) -> None:
    deadline = time.monotonic() + PATIENT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_blocks_wait_for_a_tier_that_makes_progress(full, monkeypatch):
    monkeypatch.setattr(writing, "_STALL_SECONDS", PATIENT)
    store, tier = full
    hashes = chain(12)
    save(store, hashes)
    while len(tier.blocks) < 13:
        tier.gate.release()
        time.sleep(0.002)
    assert store.flush(PATIENT)
    assert set(hashes) <= set(tier.blocks)
    assert "disk_dropped_blocks" not in store.stats()


def test_a_tier_is_given_no_more_than_it_takes_while_encoders_wait(full, monkeypatch):
    store, tier = full
    monkeypatch.setattr(writing, "_BATCH_BYTES", store.stats()["queued_bytes"] + 1)
    monkeypatch.setattr(writing, "MAX_QUEUED_BYTES", 1 << 30)
    save(store, chain(8))
    until(lambda: store.stats()["encoding_blocks"] == 0)
    tier.gate.release(1000)
    assert store.flush(PATIENT)
    assert len(tier.blocks) == 9
    assert tier.most == 2


def test_nothing_waits_for_a_tier_that_stands_still(full, monkeypatch):
    monkeypatch.setattr(writing, "_STALL_SECONDS", 0.02)
    store, _ = full
    save(store, chain(12))
    until(lambda: store.stats()["encoding_blocks"] == 0)
    assert store.stats()["disk_dropped_blocks"] == 10


def test_no_more_than_a_quarter_of_the_arena_waits(full, monkeypatch):
    monkeypatch.setattr(writing, "_STALL_SECONDS", PATIENT)
    store, _ = full
    save(store, chain(30))
    until(lambda: store.stats()["encoding_blocks"] <= 16)
    assert store.stats()["disk_dropped_blocks"] > 0
