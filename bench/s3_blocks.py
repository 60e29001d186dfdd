"""What the benchmarks of the bucket share: blocks of real KV in it, stores over it, and what a read costs.

A cost is the CPU seconds of the reading process, those of the server, and the wall seconds. Where both share
the cores, wall seconds say little about a client unless the server's part is known.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from s3_server import FastServer

from kvtier.config import Config, MemoryConfig, S3Config
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore, ticket_slot

TOKENS_PER_BLOCK = 32
NAMESPACE = Namespace.from_facts({"bench": "s3"})
_BATCH = 256
_PAGE = 4096


class Cost(NamedTuple):
    """What a piece of work took, in seconds."""

    client: float
    server: float
    wall: float


class Sample(NamedTuple):
    """Blocks of real KV and their layout; block `i` of a chain is `raws[i % len(raws)]`."""

    layout: BlockLayout
    raws: list[bytes]

    def raw(self, index: int) -> bytes:
        """Return a block of a chain."""
        return self.raws[index % len(self.raws)]


def load_sample(path: Path, layers: int | None = None) -> Sample:
    """Load blocks of bf16 KV as uint16, [block, layer, K/V, head, token, dim].

    Args:
        path: A .npy file.
        layers: Layers that the blocks shall have, taken from the sample's in turn; None for the sample's.
    """
    array = np.load(path, allow_pickle=False)
    _, given, parts, heads, tokens, dim = array.shape
    assert tokens == TOKENS_PER_BLOCK
    layers = layers or given
    rows = array.reshape(-1, *array.shape[2:])
    raws = [
        np.ascontiguousarray(rows[(first * given + np.arange(layers)) % len(rows)]).tobytes()
        for first in range(len(array))
    ]
    return Sample(BlockLayout("bfloat16", tokens, layers, parts, heads * tokens * dim, head_dim=dim), raws)


def settings(endpoint: str, transport: str, **more: object) -> S3Config:
    """Return the configuration of a bucket on the server."""
    os.environ.update(KVTIER_BENCH_KEY="bench")
    return S3Config(
        bucket="bench",
        endpoint=endpoint,
        access_key_env="KVTIER_BENCH_KEY",
        secret_key_env="KVTIER_BENCH_KEY",  # noqa: S106 - a variable's name
        transport=transport,
        **more,
    )


def open_store(endpoint: str, sample: Sample, blocks: int, form: str = "raw", **more: object) -> TieredStore:
    """Open a store with room for a chain, in memory that has been touched (pinned) before, and its index."""
    size = sample.layout.block_bytes * blocks + (64 << 20)
    config = Config(memory=MemoryConfig(size=size, format=form), s3=settings(endpoint, "http", **more))
    store = TieredStore.open(config, NAMESPACE, sample.layout)
    for slot in range(store.memory.slots):
        touch(store.memory.view(slot))
    while not store.stats()["s3_ready"]:
        time.sleep(0.01)
    return store


def touch(memory: memoryview) -> None:
    """Have the kernel give the pages."""
    memory[::_PAGE] = bytes(len(memory[::_PAGE]))


def chain(number: int, blocks: int) -> list[bytes]:
    """Return the hashes of a chain of its own."""
    first = number << 40
    tokens = np.arange(first, first + blocks * TOKENS_PER_BLOCK)
    return hash_blocks(chain_root(NAMESPACE.id), tokens, TOKENS_PER_BLOCK)


def fill(endpoint: str, sample: Sample, hashes: Sequence[bytes]) -> None:
    """Write a chain into the bucket, as kvtier does."""
    # Half of the arena may wait for its encoder.
    store = open_store(endpoint, sample, 2 * _BATCH)
    for start in range(0, len(hashes), _BATCH):
        parent = hashes[start - 1] if start else chain_root(NAMESPACE.id)
        for index, ticket in enumerate(store.reserve(parent, start, hashes[start : start + _BATCH])):
            assert ticket is not None
            store.slot_view(ticket_slot(ticket))[:] = sample.raw(start + index)
            store.commit([ticket])
        # What waits for its encoder is bounded: more than that would be dropped.
        assert store.flush(120)
    assert store.stats()["s3_blocks_known"] == len(hashes)
    store.close()


def read(store: TieredStore, hashes: Sequence[bytes]) -> None:
    """Look a chain up and wait until all of it lies in slots."""
    while True:
        # A bucket that rests for a quarter of a second is not waited for any longer: ask again.
        found = store.match(hashes, wait=60)
        store.release(found.lease)
        if len(found.slots) == len(hashes):
            return


def measured(work: Callable[[], object], server: FastServer) -> Cost:
    """Run `work` and return what it cost."""
    before, busy, start = own_seconds(), server.cpu_seconds(), time.perf_counter()
    work()
    return Cost(own_seconds() - before, server.cpu_seconds() - busy, time.perf_counter() - start)


def report(name: str, costs: Sequence[Cost], gb: float) -> None:
    """Print the medians for `gb` GB of KV."""
    client, server, wall = (statistics.median(column) for column in zip(*costs, strict=True))
    print(
        f"{name:16} {gb / wall:6.2f} GB/s of KV; CPU s per GB: {client / gb:5.3f}, "
        f"with the server's {(client + server) / gb:5.3f}",
        flush=True,
    )


def times_as_fast(costs: Sequence[Cost], others: Sequence[Cost]) -> str:
    """Say how many times as fast one is as another, round by round, and how many times as cheap."""
    fast = statistics.median(b.wall / a.wall for a, b in zip(costs, others, strict=True))
    cheap = statistics.median(
        (b.client + b.server) / (a.client + a.server) for a, b in zip(costs, others, strict=True)
    )
    return f"{fast:.2f} x as fast, {cheap:.2f} x as cheap with the server's part"


def own_seconds() -> float:
    """Return the CPU seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
