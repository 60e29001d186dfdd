"""CPU seconds and speed of moving data to and from a bucket: kvtier's own client against boto3.

python bench/s3.py                         CPU time of a GET or PUT, and per GiB, by size and in flight
python bench/s3.py --input KV.npy          from bucket to decoded, verified slots, against an object a block

Each row is the median of several rounds; the clients take turns within each round, against a server in
another process (bench/s3_server.py) that does nothing but send and receive.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import boto3
from botocore.config import Config as BotoConfig
from s3_blocks import (
    Cost,
    Sample,
    chain,
    fill,
    load_sample,
    measured,
    open_store,
    read,
    report,
    settings,
    times_as_fast,
    touch,
)
from s3_server import SOURCE_BYTES, FastServer

from kvtier._counters import Counters
from kvtier.tiers.s3.bucket import Bucket, FetchesInTurns
from kvtier.tiers.s3.lanes import Lanes
from kvtier.tiers.s3.open_bucket import open_bucket
from kvtier.tiers.s3.reader import THREADS

CLIENTS = ("http", "boto3")
KEY = "bench/source/object"
IN_FLIGHT = 32
SHAPES = (
    *((64 << 10, in_flight) for in_flight in (8, 32, 64, 128, 256)),
    *((size, IN_FLIGHT) for size in (1 << 20, 8 << 20, 16 << 20)),
)
"""Bytes of a request, and how many are under way."""


def in_threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def transfer(bucket: Bucket, kind: str, size: int, in_flight: int, total: int) -> Callable[[], None]:
    """Return what makes the requests: as the tier makes them, in turns or in a thread for each."""
    requests = max(1, total // size // in_flight)
    body = os.urandom(size)
    buffers = [memoryview(bytearray(size)) for _ in range(in_flight if kind == "GET" else 0)]
    for buffer in buffers:
        touch(buffer)

    def offset(turn: int) -> int:
        return turn * size % (SOURCE_BYTES - size + 1)

    def work(number: int) -> None:
        for turn in range(requests):
            if kind == "GET":
                bucket.get_range(KEY, offset(number * requests + turn), buffers[number])
            else:
                bucket.put(f"bench/sink/{number}-{turn}", body)

    async def get(turn: int) -> None:
        buffer = buffers.pop()
        assert isinstance(bucket, FetchesInTurns)
        await bucket.fetch_parts(KEY, offset(turn), size, iter([buffer]))
        buffers.append(buffer)

    def in_turns() -> None:
        lanes = Lanes("bench", THREADS, in_flight)
        for future in [lanes.submit(partial(get, turn)) for turn in range(in_flight * requests)]:
            future.result()
        lanes.close()

    if kind == "GET" and isinstance(bucket, FetchesInTurns):
        return in_turns
    return lambda: in_threads(in_flight, work)


def compare_clients(rounds: int, total: int) -> None:
    print(f"{'request':24}" + "".join(f"{name:>32}" for name in CLIENTS) + f"{'ratio':>8}")
    with FastServer() as server:
        buckets = {
            name: open_bucket(settings(server.endpoint, name, concurrency=256), Counters())
            for name in CLIENTS
        }
        for kind in ("GET", "PUT"):
            for size, in_flight in SHAPES:
                volume = min(total, 4096 * size)
                rows: dict[str, list[Cost]] = {name: [] for name in CLIENTS}
                for _ in range(rounds):
                    for name, bucket in buckets.items():
                        work = transfer(bucket, kind, size, in_flight, volume)
                        rows[name].append(measured(work, server))
                requests = max(1, volume // size // in_flight) * in_flight
                cpu = {name: statistics.median(row.client for row in rows[name]) for name in CLIENTS}
                gib = requests * size / 2**30
                cells = "".join(
                    f"{cpu[name] / requests * 1e6:10.0f} us {cpu[name] / gib:10.2f} s/GiB" for name in CLIENTS
                )
                print(
                    f"{kind} {size >> 10:6} KiB x {in_flight:3}    {cells}{cpu['boto3'] / cpu['http']:8.1f}",
                    flush=True,
                )


def to_slots(sample: Sample, blocks: int, forms: Sequence[str], rounds: int, latency: float) -> None:
    """Compare the store's way from the bucket with boto3 reading one object a block into memory like it."""
    size = sample.layout.block_bytes
    hashes = chain(0, blocks)
    with FastServer(latency) as server:
        fill(server.endpoint, sample, hashes)
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=server.endpoint,
            region_name="us-east-1",
            aws_access_key_id="bench",
            aws_secret_access_key="bench",  # noqa: S106 - of a server that checks none
            config=BotoConfig(s3={"addressing_style": "path"}, max_pool_connections=IN_FLIGHT),
        )
        for index in range(blocks):
            client.put_object(Bucket="bench", Key=f"naive/{index}", Body=sample.raw(index))
        arena = memoryview(bytearray(size * blocks))
        touch(arena)

        def fetch(index: int) -> None:
            body = client.get_object(Bucket="bench", Key=f"naive/{index}")["Body"]
            arena[index * size : (index + 1) * size] = body.read()

        def naive() -> None:
            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                list(pool.map(fetch, range(blocks)))

        costs: dict[str, list[Cost]] = {}
        for turn in range(rounds + 1):
            for form in forms:
                store = open_store(server.endpoint, sample, blocks, form)
                cost = measured(partial(read, store, hashes), server)
                gets = store.stats()["s3_get_requests"]
                store.close()
                if turn:
                    costs.setdefault(f"kvtier, {form}", []).append(cost)
            cost = measured(naive, server)
            if turn:
                costs.setdefault("boto3", []).append(cost)
    print(f"{blocks} blocks of {size >> 10} KiB, {gets:.0f} GETs of kvtier with those of the index")
    for name, rows in costs.items():
        report(name, rows, size * blocks / 1e9)
    for form in forms:
        print(f"kvtier, {form}: {times_as_fast(costs[f'kvtier, {form}'], costs['boto3'])}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, help="bf16 KV as uint16, [block, layer, K/V, head, token, dim]")
    parser.add_argument("--layers", type=int, help="layers of a block, those of the input by default")
    parser.add_argument("--blocks", type=int, default=1024)
    parser.add_argument("--slots", nargs="+", default=["raw", "planes"], choices=["raw", "planes"])
    parser.add_argument("--latency", type=float, default=0.0, help="seconds until the server answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gib", type=float, default=2.0, help="volume of each measurement")
    arguments = parser.parse_args()
    if arguments.input:
        sample = load_sample(arguments.input, arguments.layers)
        to_slots(sample, arguments.blocks, arguments.slots, arguments.rounds, arguments.latency)
    else:
        compare_clients(arguments.rounds, int(arguments.gib * 2**30))


if __name__ == "__main__":
    main()
