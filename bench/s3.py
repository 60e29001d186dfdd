"""CPU seconds and speed of moving data to and from a bucket: kvtier's own client against boto3.

python bench/s3.py                         CPU seconds per GiB of GET and PUT, by size of a request
python bench/s3.py --input KV.npy          from bucket to decoded, verified slots, against an object a block

Each row is the median of several rounds; the clients take turns within each round, against a server in
another process (bench/s3_server.py) that does nothing but send and receive.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
from botocore.config import Config as BotoConfig
from s3_server import SOURCE_BYTES, FastServer

from kvtier._counters import Counters
from kvtier.config import Config, MemoryConfig, S3Config
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore, ticket_slot
from kvtier.tiers.s3.bucket import Bucket
from kvtier.tiers.s3.open_bucket import open_bucket

CLIENTS = ("http", "boto3")
IN_FLIGHT = 32
BATCH = 256


def settings(endpoint: str, transport: str, **more: object) -> S3Config:
    os.environ.update(KVTIER_BENCH_KEY="bench")
    return S3Config(
        bucket="bench",
        endpoint=endpoint,
        access_key_env="KVTIER_BENCH_KEY",
        secret_key_env="KVTIER_BENCH_KEY",  # noqa: S106 - a variable's name
        transport=transport,
        **more,
    )


def measured(work: Callable[[], None]) -> tuple[float, float]:
    """Run `work` and return the CPU seconds of this process and the wall seconds."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def transfer(bucket: Bucket, kind: str, size: int, in_flight: int, total: int) -> Callable[[], None]:
    requests = max(1, total // size // in_flight)
    body = os.urandom(size)
    buffers = [memoryview(bytearray(size)) for _ in range(in_flight if kind == "GET" else 0)]

    def work(number: int) -> None:
        for turn in range(requests):
            if kind == "GET":
                offset = (number * requests + turn) * size % (SOURCE_BYTES - size + 1)
                bucket.get_range("bench/source/object", offset, buffers[number])
            else:
                bucket.put(f"bench/sink/{number}-{turn}", body)

    return lambda: in_threads(in_flight, work)


def compare_clients(rounds: int, total: int) -> None:
    print(f"{'request':24}" + "".join(f"{name:>22}" for name in CLIENTS) + f"{'ratio':>8}")
    with FastServer() as server:
        buckets = {
            name: open_bucket(settings(server.endpoint, name, concurrency=256), Counters())
            for name in CLIENTS
        }
        for kind in ("GET", "PUT"):
            for size, in_flight in (
                (64 << 10, 32),
                (64 << 10, 256),
                (1 << 20, 32),
                (8 << 20, 32),
                (16 << 20, 32),
            ):
                volume = min(total, 2048 * size)
                rows: dict[str, list[tuple[float, float]]] = {name: [] for name in CLIENTS}
                for _ in range(rounds):
                    for name, bucket in buckets.items():
                        rows[name].append(measured(transfer(bucket, kind, size, in_flight, volume)))
                gib = max(1, volume // size // in_flight) * size * in_flight / 2**30
                cpu = {name: statistics.median(row[0] for row in rows[name]) / gib for name in CLIENTS}
                speed = {
                    name: gib * 1.073741824 / statistics.median(row[1] for row in rows[name])
                    for name in CLIENTS
                }
                cells = "".join(f"{cpu[name]:8.2f} s {speed[name]:6.2f} GB/s" for name in CLIENTS)
                print(
                    f"{kind} {size >> 10:6} KiB x {in_flight:3}    {cells}{cpu['boto3'] / cpu['http']:8.1f}",
                    flush=True,
                )


def to_slots(path: Path, tokens_per_block: int, blocks: int, rounds: int) -> None:
    """Compare the store's way from the bucket with boto3 reading one object a block into the same memory."""
    sample = np.load(path)
    raws = [np.ascontiguousarray(block).tobytes() for block in sample]
    layers, kv_factor = sample.shape[1], sample.shape[2]
    layout = BlockLayout(
        "bfloat16",
        tokens_per_block=tokens_per_block,
        layers=layers,
        kv_factor=kv_factor,
        row_elements=sample[0].size // layers // kv_factor,
    )
    raw_bytes = layout.block_bytes * blocks
    with FastServer() as server:
        namespace = Namespace.from_facts({"bench": "s3"})
        root = chain_root(namespace.id)
        hashes = hash_blocks(root, np.arange(blocks * tokens_per_block), tokens_per_block)

        def open_store() -> TieredStore:
            s3 = settings(server.endpoint, "http")
            config = Config(memory=MemoryConfig(size=raw_bytes + (64 << 20)), s3=s3)
            return TieredStore.open(config, namespace, layout)

        store = open_store()
        while not store.stats()["s3_ready"]:
            time.sleep(0.01)
        for start in range(0, blocks, BATCH):
            parent = hashes[start - 1] if start else root
            for index, ticket in enumerate(store.reserve(parent, start, hashes[start : start + BATCH])):
                assert ticket is not None
                store.slot_view(ticket_slot(ticket))[:] = raws[index % len(raws)]
                store.commit([ticket])
            # What waits for its encoder is bounded: more than that would be dropped.
            assert store.flush(120)
        store.close()

        client = boto3.session.Session().client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # noqa: S106 - of a server that checks none
            config=BotoConfig(s3={"addressing_style": "path"}, max_pool_connections=IN_FLIGHT),
        )
        for index in range(blocks):
            client.put_object(Bucket="bench", Key=f"naive/{index}", Body=raws[index % len(raws)])
        arena = memoryview(bytearray(raw_bytes))
        arena[::4096] = bytes(len(arena[::4096]))

        def naive() -> None:
            def fetch(index: int) -> None:
                start = index * layout.block_bytes
                body = client.get_object(Bucket="bench", Key=f"naive/{index}")["Body"]
                arena[start : start + layout.block_bytes] = body.read()

            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                list(pool.map(fetch, range(blocks)))

        def staged(store: TieredStore) -> None:
            got = store.match(hashes, wait=60)
            assert len(got.slots) == blocks, len(got.slots)

        times: dict[str, list[tuple[float, float]]] = {"kvtier": [], "boto3": []}
        for turn in range(rounds + 1):
            store = open_store()
            while not store.stats()["s3_ready"]:
                time.sleep(0.01)
            # An arena that serves has been touched (pinned) before.
            for slot in range(store.memory.slots):
                store.memory.view(slot)[::4096] = bytes(len(store.memory.view(slot)[::4096]))
            for name, work in (("kvtier", lambda store=store: staged(store)), ("boto3", naive)):
                row = measured(work)
                if turn:
                    times[name].append(row)
            gets = store.stats()["s3_get_requests"]
            store.close()
        gb = raw_bytes / 1e9
        for name, rows in times.items():
            cpu, wall = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"{name:8} {gb / wall:6.2f} GB/s of KV, {cpu / gb:5.2f} CPU s per GB")
        ratio = statistics.median(b[1] / a[1] for a, b in zip(times["kvtier"], times["boto3"], strict=True))
        print(
            f"{blocks} blocks of {layout.block_bytes >> 10} KiB; kvtier {ratio:.1f} x as fast; "
            f"{gets:.0f} GETs with those of the index"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, help="bf16 KV as uint16, [block, layer, K/V, ...]")
    parser.add_argument("--tokens-per-block", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=2.0, help="volume of each measurement")
    arguments = parser.parse_args()
    if arguments.input:
        to_slots(arguments.input, arguments.tokens_per_block, arguments.blocks, arguments.rounds)
    else:
        compare_clients(arguments.rounds, int(arguments.gib * 2**30))


if __name__ == "__main__":
    main()
