"""The worker's half without an engine: when it begins to save on a GPU, which here is pretended."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

import numpy as np
import torch

from kvtier.codec import PlaneSlots, RawSlots, slot_form
from kvtier.connector.transfer import Blocks
from kvtier.errors import ConfigError
from kvtier.layout import BlockLayout
from kvtier.store.base import ticket_slot
from kvtier.vllm import worker as module
from kvtier.vllm.meta import ConnectorMeta, Load, Save, WorkerMeta
from kvtier.vllm.movers import transfers_for
from kvtier.vllm.pool import LayerPool
from tests.s3_support import eventually
from tests.store_support import chain, make_store

HEADS, TOKENS, SIZE, LAYERS, BLOCKS = 2, 4, 8, 3, 6
LAYOUT = BlockLayout("float32", TOKENS, LAYERS, 2, HEADS * TOKENS * SIZE, head_dim=SIZE)
NAMES = tuple(f"layers.{n}" for n in range(LAYERS))


def facts(**changes: object) -> SimpleNamespace:
    values = {
        "layout": LAYOUT, "layers": NAMES, "heads": HEADS, "head_size": SIZE, "latent": False,
        "rows": "head, token, dim", "on_cpu": False, "rank": 0, "ranks": 1,
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def content(seed: int = 0) -> torch.Tensor:
    """Return blocks `[blocks, layers, 2, heads, tokens, dim]` as they are stored."""
    shape = (BLOCKS, LAYERS, 2, HEADS, TOKENS, SIZE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pools() -> dict[str, tuple[SimpleNamespace, dict[str, torch.Tensor]]]:
    """Return the same blocks in every layout that vLLM has."""
    blocks = content()
    layers = {name: blocks[:, n] for n, name in enumerate(NAMES)}
    cpu = {}
    for name, layer in layers.items():
        keys = layer[:, 0].transpose(2, 3).flatten(2)
        cpu[name] = torch.cat([keys, layer[:, 1].flatten(2)], 2).view(BLOCKS, HEADS, TOKENS, 2 * SIZE)
    return {
        "HND": (facts(), {n: x.contiguous().transpose(2, 3) for n, x in layers.items()}),
        "NHD": (facts(), {n: x.transpose(2, 3).contiguous() for n, x in layers.items()}),
        "K/V first": (
            facts(),
            {n: x.transpose(2, 3).transpose(0, 1).contiguous() for n, x in layers.items()},
        ),
        "K by V": (
            facts(),
            {n: x.permute(0, 2, 3, 1, 4).reshape(BLOCKS, HEADS, TOKENS, 2 * SIZE) for n, x in layers.items()},
        ),
        "CPU": (facts(on_cpu=True), cpu),
    }


@pytest.mark.parametrize("name", list(pools()))
def test_every_layout_has_the_same_bytes_in_a_slot(name):
    engine, caches = pools()[name]
    pool = LayerPool(caches, BLOCKS, engine)
    assert (pool.map is not None) == (name == "HND")
    mover = transfers_for(pool, RawSlots(LAYOUT)).mover
    slots = torch.zeros(BLOCKS, LAYOUT.block_bytes, dtype=torch.uint8)
    addresses = [slot.data_ptr() for slot in slots]
    blocks = Blocks(np.array(addresses, dtype=np.uint64), [(n,) for n in range(BLOCKS)])
    mover.save(blocks, 0)
    assert torch.equal(slots.view(torch.float32).view(content().shape), content())
    for cache in caches.values():
        cache.zero_()
    mover.load(blocks, 0)
    again = torch.zeros_like(slots)
    mover.save(Blocks(np.array([s.data_ptr() for s in again], dtype=np.uint64), blocks.pages), 0)
    assert torch.equal(again, slots)
    for page in (-1, BLOCKS):
        with pytest.raises(IndexError):
            mover.load(Blocks(blocks.slots[:1], [(page,)]), 0)


def test_planes_are_for_pools_whose_blocks_lie_as_they_are_stored():
    layout = dataclasses.replace(LAYOUT, dtype="bfloat16")
    form = slot_form(layout, "planes")
    assert isinstance(form, PlaneSlots)
    engine, caches = pools()["NHD"]
    engine.layout = layout
    other = {name: cache.to(torch.bfloat16) for name, cache in caches.items()}
    with pytest.raises(ConfigError, match="HND"):
        transfers_for(LayerPool(other, BLOCKS, engine), form)
    caches = {name: cache.to(torch.bfloat16) for name, cache in pools()["HND"][1].items()}
    before = {name: cache.clone() for name, cache in caches.items()}
    mover = transfers_for(LayerPool(caches, BLOCKS, engine), form).mover
    slots = np.zeros((BLOCKS, form.shard_bytes), np.uint8)
    addresses = np.array([slot.ctypes.data for slot in slots], dtype=np.uint64)
    mover.save(Blocks(addresses, [(n,) for n in range(BLOCKS)]), 0)
    assert all(form.whole(memoryview(slot)) for slot in slots)
    for cache in caches.values():
        cache.zero_()
    mover.load(Blocks(addresses, [(n,) for n in range(BLOCKS)]), 0)
    assert all(torch.equal(caches[name], before[name]) for name in NAMES)


class Event:
    """Something that the GPU has still to do."""

    over = False

    def query(self) -> bool:
        return self.over


@pytest.fixture
def rig(monkeypatch):
    """A worker's half over a pool in host memory that it takes for a GPU's, and its store."""
    store = make_store(layout=LAYOUT)
    config = SimpleNamespace(num_blocks=BLOCKS)
    monkeypatch.setattr(
        module, "load_config", lambda path: SimpleNamespace(memory=SimpleNamespace(format="raw"))
    )
    monkeypatch.setattr(module, "config_path", lambda vllm_config: None)
    monkeypatch.setattr(module.EngineFacts, "read", lambda *arguments: facts())
    monkeypatch.setattr(module, "open_part", lambda *arguments: SimpleNamespace(store=store))
    half = module.WorkerHalf(SimpleNamespace(model_config=None), config)
    half.register(pools()["HND"][1])
    events = []

    def record() -> Event:
        events.append(Event())
        return events[-1]

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=record))
    half._delays = True
    yield half, store, events
    half.close()
    store.close()


def reserved(store, blocks) -> tuple[Save, ...]:
    tickets = store.reserve(b"r" * 16, 0, blocks)
    return tuple(Save(ticket, page) for page, ticket in enumerate(tickets))


def test_saves_begin_when_their_step_is_computed(rig):
    half, store, events = rig
    blocks = chain(3)
    half.bind(ConnectorMeta(1, saves=reserved(store, blocks)))
    half.save()
    half.bind(ConnectorMeta(2))
    half.save()
    assert half.take_counts() == {}
    events[0].over = True
    eventually(lambda: half.take_counts().get("saved_blocks") == 3, 10)
    slots = store.match(blocks).slots
    saved = torch.stack([torch.frombuffer(store.slot_view(slot), dtype=torch.float32) for slot in slots])
    assert torch.equal(saved.view(3, *content().shape[1:]), content()[:3])


def test_the_engines_thread_gets_its_turn_between_many_saves(rig, monkeypatch):
    half, store, events = rig
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    begun, save = [], half._transfers.save

    def counted(stream, blocks, done, number):
        begun.append(len(blocks.slots))
        save(stream, blocks, done, number)

    monkeypatch.setattr(half._transfers, "save", counted)
    half.bind(ConnectorMeta(1, saves=reserved(store, chain(5))))
    half.save()
    events[0].over = True
    eventually(lambda: half.take_counts().get("saved_blocks") == 5, 10)
    assert begun == [2, 2, 1]
    assert len(store.match(chain(5)).slots) == 5


def test_a_look_that_fails_is_not_the_last_one(rig):
    half, store, events = rig

    def fail() -> bool:
        failed.set()
        raise RuntimeError("operation not permitted when stream is capturing")

    failed = threading.Event()
    half.bind(ConnectorMeta(1, saves=reserved(store, chain(1))))
    half.save()
    events[0].query = fail
    assert failed.wait(10)
    eventually(lambda: not half._watching, 10)
    del events[0].query
    events[0].over = True
    half.bind(ConnectorMeta(2, saves=reserved(store, chain(1, seed=1))))
    half.save()
    eventually(lambda: half.take_counts().get("saved_blocks") == 1, 10)
    assert len(store.match(chain(1)).slots) == 1


def test_saves_begin_at_once_when_their_pages_are_going_to_be_overwritten(rig):
    half, store, _ = rig
    half.bind(ConnectorMeta(1, saves=reserved(store, chain(2))))
    half.save()
    half.bind(ConnectorMeta(2, behind=1))
    assert half.take_counts()["saved_blocks"] == 2


def test_after_a_failed_load_nothing_is_saved_until_the_scheduler_knows(rig):
    half, store, _ = rig
    half._delays = False
    half.bind(ConnectorMeta(1, loads=(Load(0, (), (4, 5)),), saves=reserved(store, chain(1))))
    half.load()
    half.save()
    assert half.take_failed_pages() == {4, 5}
    assert half.meta() == WorkerMeta(1, failed=1)
    half.bind(ConnectorMeta(2, saves=reserved(store, chain(1, seed=1))))
    half.save()
    assert half.take_counts()["save_failed_blocks"] == 2
    half.bind(ConnectorMeta(3, settled=1, saves=reserved(store, chain(1, seed=2))))
    half.save()
    assert half.take_counts()["saved_blocks"] == 1
    assert store.stats()["filling_slots"] == 0


def test_what_was_computed_over_missing_blocks_is_not_saved_later_either(rig):
    half, store, events = rig
    half.bind(ConnectorMeta(1, loads=(Load(0, (), (4, 5)),), saves=reserved(store, chain(1))))
    half.load()
    half.save()
    # The engine runs ahead: this step was ordered before the scheduler had heard of it.
    half.bind(ConnectorMeta(2, saves=reserved(store, chain(1, seed=1))))
    half.save()
    half.bind(ConnectorMeta(3, settled=1, behind=2, saves=reserved(store, chain(1, seed=2))))
    half.save()
    for event in events:
        event.over = True
    eventually(lambda: half.take_counts().get("saved_blocks") == 1, 10)
    assert half.take_counts()["save_failed_blocks"] == 2
    assert [len(store.match(chain(1, seed=seed)).slots) for seed in range(3)] == [0, 0, 1]


@contextmanager
def vllms_pass(half) -> Iterator[None]:
    try:
        yield
    finally:
        half.save()


def test_nothing_is_saved_of_a_step_whose_pass_failed(rig):
    half, store, _ = rig
    half._delays = False
    half.bind(ConnectorMeta(1, saves=reserved(store, chain(2))))
    with pytest.raises(RuntimeError, match="out of memory"), vllms_pass(half):
        raise RuntimeError("out of memory")
    assert store.stats()["filling_slots"] == 0
    assert store.match(chain(2)).slots == ()
    try:
        raise ValueError("the engine's caller may have troubles of its own")
    except ValueError:
        half.bind(ConnectorMeta(2, saves=reserved(store, chain(2))))
        with vllms_pass(half):
            pass
    assert len(store.match(chain(2)).slots) == 2


def test_orders_of_a_step_that_was_called_off_are_given_up(rig):
    half, store, _ = rig
    saves = reserved(store, chain(2))
    assert all(ticket_slot(save.ticket) < BLOCKS * 4 for save in saves)
    half.bind(ConnectorMeta(1, saves=saves))
    half.bind(ConnectorMeta(2))
    assert store.stats()["filling_slots"] == 0
