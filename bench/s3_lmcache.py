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
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import numpy as np
import torch
from botocore.config import Config as BotoConfig
from lmcache.v1.storage_backend.connector.s3_connector import S3Connector
from s3_blocks import (
    TOKENS_PER_BLOCK,
    Cost,
    chain,
    fill,
    load_sample,
    measured,
    open_store,
    read,
    report,
    times_as_fast,
    touch,
)
from s3_server import FastServer

from kvtier.layout import BlockLayout

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
        touch(self.memory)
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
        "--input", type=Path, required=True, help="bf16 KV as uint16, [block, layer, K/V, head, token, dim]"
    )
    parser.add_argument("--layers", type=int, help="layers of a block, those of the input by default")
    parser.add_argument("--blocks", type=int, default=512)
    parser.add_argument("--slots", nargs="+", default=["raw", "planes"], choices=["raw", "planes"])
    parser.add_argument("--latency", type=float, default=0.0, help="seconds until the server answers")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sample = load_sample(arguments.input, arguments.layers)
    blocks, forms = arguments.blocks, arguments.slots
    hashes = chain(0, blocks)
    with FastServer(arguments.latency) as server:
        fill(server.endpoint, sample, hashes)
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # noqa: S106 - of a server that checks none
            config=BotoConfig(s3={"addressing_style": "path"}),
        )
        step = CHUNK_TOKENS // TOKENS_PER_BLOCK
        chunks = [
            b"".join(sample.raw(index) for index in range(start, start + step))
            for start in range(0, blocks, step)
        ]
        for number, body in enumerate(chunks):
            client.put_object(Bucket="bench", Key=f"chunk-{number}", Body=body)
        logging.disable(logging.INFO)
        peer = Peer(server.endpoint, sample.layout, len(chunks))
        costs: dict[str, list[Cost]] = {}
        for turn in range(arguments.rounds + 1):
            for form in forms:
                store = open_store(server.endpoint, sample, blocks, form)
                cost = measured(partial(read, store, hashes), server)
                store.close()
                if turn:
                    costs.setdefault(f"kvtier, {form}", []).append(cost)
            peer.connect()
            cost = measured(peer.load, server)
            if turn:
                costs.setdefault("lmcache", []).append(cost)
        assert bytes(peer.memory[: len(chunks[0])]) == chunks[0]
    size = sample.layout.block_bytes
    print(f"{blocks} blocks of {size >> 10} KiB, answers after {arguments.latency * 1e3:g} ms")
    for name, rows in costs.items():
        report(name, rows, size * blocks / 1e9)
    for form in forms:
        print(f"kvtier, {form}: {times_as_fast(costs[f'kvtier, {form}'], costs['lmcache'])}")
    # LMCache's workers wait for ever in their event loop.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
