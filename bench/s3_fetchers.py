"""From the bucket to decoded, verified slots by one process and by several, on a machine with many cores.

python bench/s3_fetchers.py --input KV.npy --fetchers 1 2 4

Each fetcher is a process with a store of its own that reads a chain of its own from one server on loopback;
all start at once, and the time is from the first one's start to the last one's end.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

from s3_blocks import Sample, chain, fill, load_sample, open_store, own_seconds, read
from s3_server import FastServer


class Span(NamedTuple):
    """One fetcher's part of a round."""

    begun: float
    ended: float
    cpu: float


class Case(NamedTuple):
    """What is measured."""

    sample: Sample
    blocks: int
    form: str
    concurrency: int
    rounds: int


def fetch(endpoint: str, case: Case, number: int, barrier: Barrier, spans: Queue[Span]) -> None:
    """Be a fetcher."""
    hashes = chain(number, case.blocks)
    store = open_store(endpoint, case.sample, case.blocks, case.form, concurrency=case.concurrency)
    for _ in range(case.rounds):
        store.memory.discard(hashes)
        barrier.wait()
        begun, before = time.monotonic(), own_seconds()
        read(store, hashes)
        spans.put(Span(begun, time.monotonic(), own_seconds() - before))
    store.close()


def measure(server: FastServer, case: Case, fetchers: int) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, spans = context.Barrier(fetchers + 1), context.Queue()
    workers = [
        context.Process(target=fetch, args=(server.endpoint, case, number, barrier, spans))
        for number in range(fetchers)
    ]
    for worker in workers:
        worker.start()
    gb = fetchers * case.blocks * case.sample.layout.block_bytes / 1e9
    speeds, clients, servers = [], [], []
    for turn in range(case.rounds):
        busy = server.cpu_seconds()
        barrier.wait()
        round_ = [spans.get(timeout=120) for _ in workers]
        if turn:
            speeds.append(gb / (max(span.ended for span in round_) - min(span.begun for span in round_)))
            clients.append(sum(span.cpu for span in round_) / gb)
            servers.append((server.cpu_seconds() - busy) / gb)
    for worker in workers:
        worker.join()
    print(
        f"{fetchers} fetchers, {case.form}, {case.concurrency} connections each: "
        f"{statistics.median(speeds):5.2f} GB/s of KV (best {max(speeds):5.2f}); CPU s per GB: "
        f"{statistics.median(clients):.3f}, the server's {statistics.median(servers):.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", type=Path, required=True, help="bf16 KV as uint16, [block, layer, K/V, head, token, dim]"
    )
    parser.add_argument("--layers", type=int, help="layers of a block, those of the input by default")
    parser.add_argument("--blocks", type=int, default=256, help="blocks of each fetcher")
    parser.add_argument("--fetchers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--slots", nargs="+", default=["raw", "planes"], choices=["raw", "planes"])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sample = load_sample(options.input, options.layers)
    print(f"{os.cpu_count()} cores, {options.blocks} blocks of {sample.layout.block_bytes >> 10} KiB each")
    with FastServer() as server:
        for number in range(max(options.fetchers)):
            fill(server.endpoint, sample, chain(number, options.blocks))
        for form in options.slots:
            for concurrency in options.concurrency:
                for fetchers in options.fetchers:
                    case = Case(sample, options.blocks, form, concurrency, options.rounds + 1)
                    measure(server, case, fetchers)


if __name__ == "__main__":
    main()
