"""Memory, start and lookups of the bucket's block index with synthetic entries.

python bench/index.py                      1 million blocks in packs of 32
python bench/index.py --blocks 10000000
python bench/index.py --server 64          how long a node takes to start, 64 segments on SeaweedFS
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time

import numpy as np

from kvtier._counters import Counters
from kvtier.cli.s3server import S3Server
from kvtier.config import S3Config
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.open_bucket import open_bucket
from kvtier.tiers.s3.pack_table import BLOCK_ROW, PACK_ROW, PackTable
from kvtier.tiers.s3.segment import read_segment, write_segments

NAMESPACE = bytes(16)
PROMPT = 2048


def synthetic(blocks: int, per_pack: int, rng: np.random.Generator) -> PackTable:
    packs = np.zeros(blocks // per_pack, PACK_ROW)
    packs["name"] = np.frombuffer(rng.bytes(16 * len(packs)), "V16")
    packs["count"], packs["size"] = per_pack, 16 + per_pack * 1000 + 5000
    rows = np.zeros(len(packs) * per_pack, BLOCK_ROW)
    rows["hash"] = np.frombuffer(rng.bytes(16 * len(rows)), "V16")
    rows["offset"] = np.tile(16 + 1000 * np.arange(per_pack, dtype=np.uint64), len(packs))
    rows["length"] = 1000
    return PackTable(packs, rows)


def resident() -> int:
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * resource.getpagesize()


def start_on_server(table: PackTable, segments: int) -> None:
    """Print how long a node takes until its index is loaded from a real S3 server."""
    layout = BlockLayout("bfloat16", tokens_per_block=32, layers=2, kv_factor=2, row_elements=512)
    namespace = Namespace.from_facts({"model": "synthetic", "layout": layout.describe()})
    keys = Keys("p", namespace.hex)
    with S3Server() as server:
        names = {"access_key_env": "BENCH_KEY", "secret_key_env": "BENCH_SECRET"}
        os.environ |= {"BENCH_KEY": server.access_key, "BENCH_SECRET": server.secret_key}
        server.create_bucket("bench")
        config = S3Config(bucket="bench", prefix="p", endpoint=server.endpoint, **names)
        bucket = open_bucket(config, Counters())
        step = -(-len(table) // segments)
        for start in range(0, len(table), step):
            for body in write_segments(table.take(range(start, min(start + step, len(table)))), namespace.id):
                bucket.put(keys.new_segment(time.time_ns()), body)
        bucket.close()
        walls, busy = [], []
        for _ in range(5):
            wall, cpu = time.perf_counter(), time.process_time()
            tier = S3Tier(config, namespace, layout, 1 << 20, upkeep=False)
            assert tier.wait_ready(120)
            walls.append(time.perf_counter() - wall)
            busy.append(time.process_time() - cpu)
            assert tier.stats()["blocks_known"] == len(table.blocks)
            tier.close(0)
        print(
            f"{len(table.blocks)} blocks in {segments} segments: ready in {statistics.median(walls):.2f} s, "
            f"at most {max(walls):.2f}; {statistics.median(busy):.2f} s of CPU; medians of 5"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--per-pack", type=int, default=32)
    parser.add_argument("--twice", action="store_true", help="every segment twice, as after a compaction")
    parser.add_argument("--server", type=int, help="start from so many segments on SeaweedFS, no more")
    arguments = parser.parse_args()
    rng = np.random.default_rng(1)
    table = synthetic(arguments.blocks, arguments.per_pack, rng)
    if arguments.server:
        start_on_server(table, arguments.server)
        return
    segments = write_segments(table, NAMESPACE)
    blocks = len(table.blocks)
    chosen = [
        table.blocks["hash"][start : start + PROMPT].tobytes()
        for start in rng.integers(0, blocks - PROMPT, 50)
    ]
    prompts = [[data[at : at + 16] for at in range(0, len(data), 16)] for data in chosen]
    del table

    index = BlockIndex()
    again = segments if arguments.twice else []
    before, start, busy = resident(), time.perf_counter(), time.process_time()
    for number, body in enumerate(list(segments)):
        index.add(read_segment(body, NAMESPACE, 1 << 20))
        segments[number] = b"" if not arguments.twice else body
    for body in again:
        index.add(read_segment(body, NAMESPACE, 1 << 20))
    wall, busy = time.perf_counter() - start, time.process_time() - busy
    again.clear()
    freed = 28 * blocks + 48 * (blocks // arguments.per_pack)
    print(f"{blocks} blocks in segments: loaded in {wall:.2f} s, {busy:.2f} s of CPU")
    print(
        f"{index.memory_bytes() / blocks:.1f} bytes a block counted, "
        f"{(resident() - before + freed) / blocks:.1f} by growth of the process (segments freed meanwhile)"
    )
    for name, look in (("match", index.match), ("locate", index.locate)):
        times = []
        for prompt in prompts:
            start = time.perf_counter()
            found = look(prompt)
            times.append((time.perf_counter() - start) / PROMPT)
            assert (found if isinstance(found, int) else sum(place is not None for place in found)) == PROMPT
        print(f"{name}: {statistics.median(times) * 1e6:.2f} us a block, prompts of {PROMPT} blocks")
    missing = [[rng.bytes(16), *prompt[1:]] for prompt in prompts]
    times = []
    for prompt in missing:
        start = time.perf_counter()
        assert index.match(prompt) == 0
        times.append(time.perf_counter() - start)
    print(f"match that misses at once: {statistics.median(times) * 1e6:.0f} us")


if __name__ == "__main__":
    main()
