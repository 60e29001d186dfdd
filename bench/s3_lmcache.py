"""From the bucket into memory: kvtier's store against LMCache's S3 connector, taking turns in one process.

python bench/s3_lmcache.py --input tests/data/kv_bf16.npy

Needs lmcache and awscrt beside kvtier, neither of which kvtier itself depends on. LMCache's connector is
driven as its remote backend does (`batched_get`), without the rest of it: objects of 256 tokens, raw, one
GET and one HEAD each, bytes unchecked. kvtier's blocks are found in its index, decoded and verified.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
import torch
from botocore.config import Config as BotoConfig
from lmcache.v1.storage_backend.connector.s3_connector import S3Connector
from s3 import BATCH, measured, settings
from s3_server import FastServer

from kvtier.config import Config, MemoryConfig
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore, ticket_slot

TOKENS_PER_BLOCK = 32
CHUNK_TOKENS = 256


class Chunk:
    """What LMCache's connector needs of a memory object."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self.data_ptr = np.frombuffer(memory, np.uint8).ctypes.data

    def get_size(self) -> int:
        """Return its bytes."""
        return len(self._memory)

    def ref_count_down(self) -> None:
        """Nobody counts here."""


class Peer:
    """LMCache's connector over chunks in memory that has been touched before."""

    def __init__(self, endpoint: str, layout: BlockLayout, chunks: int) -> None:
        size = layout.block_bytes * CHUNK_TOKENS // TOKENS_PER_BLOCK
        self.memory = memoryview(bytearray(size * chunks))
        self.memory[::4096] = bytes(len(self.memory[::4096]))
        self._rooms = [Chunk(self.memory[at * size : (at + 1) * size]) for at in range(chunks)]
        self._keys = [SimpleNamespace(to_string=lambda name=f"chunk-{at}": name) for at in range(chunks)]
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._endpoint, self._layout = endpoint, layout

    def connect(self) -> None:
        """Make a connector that knows nothing, as that of a new process."""
        free = iter(self._rooms)
        elements = self._layout.row_elements // TOKENS_PER_BLOCK
        shape = torch.Size([self._layout.kv_factor, self._layout.layers, CHUNK_TOKENS, elements])
        metadata = SimpleNamespace(
            get_shapes=lambda: [shape],
            get_dtypes=lambda: [torch.bfloat16],
            get_num_groups=lambda: 1,
            use_mla=False,
            chunk_size=CHUNK_TOKENS,
        )
        backend: Any = SimpleNamespace(
            config=SimpleNamespace(extra_config={"save_chunk_meta": False}, use_layerwise=False),
            metadata=metadata,
            allocate=lambda *_: next(free),
        )
        where = self._endpoint.removeprefix("http://")

        async def make() -> S3Connector:
            return S3Connector(
                f"s3://{where}", self._loop, backend, 64, False, "us-east-1", False, True, "bench", "bench"
            )

        self._connector = asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    def load(self) -> None:
        """Fetch all chunks."""
        got = asyncio.run_coroutine_threadsafe(self._connector.batched_get(self._keys), self._loop).result()
        assert None not in got


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="bf16 KV as uint16, [block, layer, K/V, ...]"
    )
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sample = np.load(arguments.input)
    raws = [np.ascontiguousarray(block).tobytes() for block in sample]
    layers, parts = sample.shape[1], sample.shape[2]
    layout = BlockLayout("bfloat16", TOKENS_PER_BLOCK, layers, parts, sample[0].size // layers // parts)
    blocks = arguments.blocks
    namespace = Namespace.from_facts({"bench": "lmcache"})
    root = chain_root(namespace.id)
    hashes = hash_blocks(root, np.arange(blocks * TOKENS_PER_BLOCK), TOKENS_PER_BLOCK)
    size = layout.block_bytes * blocks
    with FastServer() as server:

        def open_store() -> TieredStore:
            config = Config(memory=MemoryConfig(size=size + (64 << 20)), s3=settings(server.endpoint, "http"))
            store = TieredStore.open(config, namespace, layout)
            while not store.stats()["s3_ready"]:
                time.sleep(0.01)
            return store

        store = open_store()
        for start in range(0, blocks, BATCH):
            parent = hashes[start - 1] if start else root
            for index, ticket in enumerate(store.reserve(parent, start, hashes[start : start + BATCH])):
                assert ticket is not None
                store.slot_view(ticket_slot(ticket))[:] = raws[(start + index) % len(raws)]
                store.commit([ticket])
            assert store.flush(120)
        store.close()
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # noqa: S106 - of a server that checks none
            config=BotoConfig(s3={"addressing_style": "path"}),
        )
        step = CHUNK_TOKENS // TOKENS_PER_BLOCK
        chunks = blocks // step
        for chunk in range(chunks):
            body = b"".join(raws[(chunk * step + index) % len(raws)] for index in range(step))
            client.put_object(Bucket="bench", Key=f"chunk-{chunk}", Body=body)
        logging.disable(logging.INFO)
        peer = Peer(server.endpoint, layout, chunks)
        times: dict[str, list[tuple[float, float]]] = {"kvtier": [], "lmcache": []}
        for turn in range(arguments.rounds + 1):
            store = open_store()
            for slot in range(store.memory.slots):
                store.memory.view(slot)[::4096] = bytes(len(store.memory.view(slot)[::4096]))
            peer.connect()

            def staged(store: TieredStore = store) -> None:
                # A bucket that rests for a quarter of a second is not waited for any longer: ask again.
                while len((found := store.match(hashes, wait=60)).slots) < blocks:
                    store.release(found.lease)
                store.release(found.lease)

            for name, work in (("kvtier", staged), ("lmcache", peer.load)):
                row = measured(work)
                if turn:
                    times[name].append(row)
            store.close()
        first = b"".join(raws[index % len(raws)] for index in range(step))
        assert bytes(peer.memory[: len(first)]) == first
    for name, rows in times.items():
        cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:8} {size / 1e9 / wall:6.2f} GB/s of KV, {cpu / size * 1e9:5.2f} CPU s per GB")
    ratio = statistics.median(b[1] / a[1] for a, b in zip(times["kvtier"], times["lmcache"], strict=True))
    print(f"{blocks} blocks of {layout.block_bytes >> 10} KiB; kvtier {ratio:.2f} x as fast")
    # LMCache's workers wait for ever in their event loop.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
