"""A store whose slots hold planes: blocks come out of each tier as they were; what does not fit stays out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvtier.agent import client as agent_client
from kvtier.agent.client import AgentClient
from kvtier.codec import PlaneSlots, slot_form
from kvtier.config import parse_config
from kvtier.hashing import Namespace, chain_root
from kvtier.layout import BlockLayout
from kvtier.store import StoreClient, TieredStore, ticket_slot
from kvtier.tiers.memory import MemoryTier
from tests.agent_support import AgentThread, Place
from tests.store_support import DictTier, chain

LAYOUT = BlockLayout("bfloat16", 4, 4, 2, 512, shards=2, head_dim=64)
NAMESPACE = Namespace.from_facts({"model": "planes", **LAYOUT.describe()})
ROOT = chain_root(NAMESPACE.id)
FORM = slot_form(LAYOUT, "planes")
assert isinstance(FORM, PlaneSlots)


def block_of(block: bytes, noise: bool = False) -> bytes:
    """The bytes of a block: values around 1 with a zero among them, or bits without any order."""
    rng = np.random.default_rng(list(block))
    if noise:
        return rng.bytes(LAYOUT.block_bytes)
    values = rng.uniform(-2, 2, LAYOUT.block_bytes // 2).astype(np.float32).view(np.uint32) >> 16
    values[7] = 0
    return values.astype(np.uint16).tobytes()


def store_over(tier: DictTier, slot_format: str) -> TieredStore:
    form = slot_form(LAYOUT, slot_format)
    memory = MemoryTier(16 * (LAYOUT.block_bytes + 4096), form.slot_bytes)
    return TieredStore(NAMESPACE, LAYOUT, memory, [tier], form=form)


def save(store: StoreClient, hashes: Sequence[bytes], noise: Sequence[bytes] = ()) -> None:
    """Save blocks as two ranks do, each its shard."""
    tickets = [ticket for ticket in store.reserve(ROOT, 0, hashes) if ticket is not None]
    assert len(tickets) == len(hashes)
    for shard in range(2):
        for block, ticket in zip(hashes, tickets, strict=True):
            raw = np.frombuffer(block_of(block, block in noise), np.uint8).reshape(2, -1)[shard]
            view = np.frombuffer(store.slot_view(ticket_slot(ticket), shard), np.uint8)
            if view.size == raw.size:
                view[:] = raw
            else:
                FORM.split_shard(raw, view)
        store.commit(tickets, shard)


def read(store: StoreClient, slot: int) -> bytes:
    parts = []
    for shard in range(2):
        view = np.frombuffer(store.slot_view(slot, shard), np.uint8)
        raw = np.empty(LAYOUT.shard_bytes, np.uint8)
        if view.size == raw.size:
            raw = view
        else:
            FORM.shape.merge(FORM.shard(view), raw)
        parts.append(raw.tobytes())
    return b"".join(parts)


def check(store: StoreClient, hashes: Sequence[bytes], source: str) -> None:
    match = store.match(hashes, 10.0)
    assert [read(store, slot) for slot in match.slots] == [block_of(block) for block in hashes]
    assert match.sources == {source: len(hashes)}
    store.release(match.lease)


@pytest.mark.parametrize("formats", [("planes", "planes"), ("planes", "raw"), ("raw", "planes")])
def test_blocks_go_through_the_tiers_whatever_form_the_slots_have(formats: tuple[str, str]) -> None:
    tier, hashes = DictTier(), chain(5)
    first = store_over(tier, formats[0])
    save(first, hashes)
    check(first, hashes, "memory")
    assert first.flush(10)
    assert set(tier.blocks) == set(hashes)
    second = store_over(tier, formats[1])
    check(second, hashes, "disk")
    for store in (first, second):
        assert "unfit_blocks" not in store.stats()
        store.close()


def test_saved_blocks_that_do_not_fit_are_not_cached() -> None:
    tier, hashes = DictTier(), chain(4)
    store = store_over(tier, "planes")
    save(store, hashes, noise=hashes[2:3])
    assert len(store.match(hashes, 0).slots) == 2
    stats = store.stats()
    assert (stats["unfit_blocks"], stats["saved_blocks"], stats["filling_slots"]) == (1, 3, 0)
    assert stats["memory_blocks"] + stats["memory_free"] == stats["memory_slots"]
    assert store.flush(10)
    assert hashes[2] not in tier.blocks
    store.close()


def test_stored_blocks_that_do_not_fit_are_misses_and_stay_where_they_are() -> None:
    tier, hashes = DictTier(), chain(3)
    raw = store_over(tier, "raw")
    save(raw, hashes, noise=hashes[1:2])
    assert raw.flush(10)
    planes = store_over(tier, "planes")
    match = planes.match(hashes, 10.0)
    assert [read(planes, slot) for slot in match.slots] == [block_of(hashes[0])]
    assert planes.stats()["unfit_blocks"] == 1
    assert tier.discarded == []
    for store in (raw, planes):
        store.close()


@pytest.fixture
def place():
    place = Place(64 * 4096)
    yield place
    place.remove()


@pytest.fixture
def connect(place: Place):
    """Attach an engine's two ranks that are configured with a form of slots."""
    clients: list[AgentClient] = []

    def connect(slot_format: str, wait: float = 30.0) -> list[AgentClient]:
        config = parse_config({
            "memory": {"size": 1 << 20, "format": slot_format},
            "agent": {"mode": "external", "directory": str(place.directory)},
        })  # fmt: skip
        pair = [
            agent_client.connect(config, NAMESPACE, LAYOUT, group=slot_format, rank=rank, ranks=2, wait=wait)
            for rank in range(2)
        ]
        clients.extend(pair)
        return pair

    yield connect
    for client in clients:
        client.close(1)


def test_ranks_fill_and_read_planes_of_the_agent(
    place: Place, connect: Callable[..., list[AgentClient]]
) -> None:
    with AgentThread(place, slot_format="planes"):
        first, second = connect("planes")
        assert first.connected
        assert second.connected
        hashes = chain(3)
        save(first, hashes)
        match = first.match(hashes, 10.0)
        for rank in (first, second):
            assert [read(rank, slot) for slot in match.slots] == [block_of(block) for block in hashes]


@pytest.mark.parametrize(("agent", "engine"), [("planes", "raw"), ("raw", "planes")])
def test_an_agent_with_slots_of_another_form_lets_nobody_in(
    place: Place,
    connect: Callable[..., list[AgentClient]],
    agent: str,
    engine: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvtier._logging._last", {})
    with AgentThread(place, slot_format=agent):
        first, _ = connect(engine, wait=0.5)
        assert not first.connected
        assert first.reserve(ROOT, 0, chain(2)) == [None, None]
    assert "memory.format differs" in caplog.text
