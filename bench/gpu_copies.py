"""How fast blocks go between the arena and a pool on the GPU, and what that costs the thread that asks.

    python bench/gpu_copies.py [--mib 1024]

Pages and slots in random order, so that no copy can be joined with the next; whole batches. Every round also
copies all of it as one piece, which is what the bus gives at that moment: medians, lowest and highest, and
the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from kvtier.connector.transfer import Blocks, RawMover
from kvtier.gpu import pin
from kvtier.gpu.copies import CudaCopies
from kvtier.gpu.ranges import PageMap, Region
from kvtier.tiers.memory import MemoryTier

SIZES = [16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20]
ROUNDS = 11


class OneByOne(CudaCopies):
    """As where the driver has no batches."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._batch = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    options = parser.parse_args()
    print(
        json.dumps({"machine": torch.cuda.get_device_name(), "copies": measure(options.mib << 20)}, indent=1)
    )


def measure(total: int) -> list[dict[str, Any]]:
    """Return a row for each size of block and way to copy."""
    device = torch.device("cuda", torch.cuda.current_device())
    arena = MemoryTier(total, SIZES[-1])
    pinned = pin(arena.buffer(), device)
    pool = torch.randint(0, 255, (total,), dtype=torch.uint8, device=device)
    host = np.frombuffer(arena.buffer(), dtype=np.uint8).ctypes.data
    rows = []
    for size in SIZES:
        count = min(total // size, 4096)
        page_map = PageMap([Region(0, pool.data_ptr(), size, size, total // size)], 1)
        rng = random.Random(size)
        slots = np.array(rng.sample(range(total // size), count), dtype=np.uint64) * np.uint64(size)
        pages = [(page,) for page in rng.sample(range(total // size), count)]
        blocks = Blocks(slots + np.uint64(host), pages)
        for name, copies in (("batch", CudaCopies(device)), ("one by one", OneByOne(device))):
            mover = RawMover(page_map, copies)
            row: dict[str, Any] = {"block KiB": size >> 10, "blocks": count, "way": name}
            whole = np.array([[pool.data_ptr()], [host], [size * count]], dtype=np.uint64)
            for direction, move, ends in (("to GPU", mover.load, (0, 1)), ("from GPU", mover.save, (1, 0))):
                piece = partial(copies, whole[ends[0]], whole[ends[1]], whole[2])
                found = timed(move, piece, blocks, size * count)
                row |= {f"{key}, {direction}": value for key, value in found.items()}
            if name == "batch":
                row |= both_ways(mover, blocks, size * count)
            rows.append(row)
            print(row, flush=True)
    # All the blocks of a long prompt, asked for while the GPU is busy: the thread must not be held up.
    behind = {"blocks": 4096, "thread held up behind a busy stream, ms": held_up(page_map_of(pool, arena))}
    rows.append(behind)
    print(behind, flush=True)
    if pinned is not None:
        pinned.unpin()
    return rows


def page_map_of(pool: torch.Tensor, arena: MemoryTier) -> tuple[RawMover, Blocks]:
    """Return a mover of blocks of 64 KiB, and 4096 of these."""
    size, count = 64 << 10, 4096
    mover = RawMover(PageMap([Region(0, pool.data_ptr(), size, size, count)], 1), CudaCopies(pool.device))
    host = np.frombuffer(arena.buffer(), dtype=np.uint8).ctypes.data
    slots = np.uint64(host) + np.arange(count, dtype=np.uint64)[::-1] * np.uint64(size)
    return mover, Blocks(np.ascontiguousarray(slots), [(page,) for page in range(count)])


def timed(
    move: Callable[[Blocks, int], None], piece: Callable[[int], None], blocks: Blocks, total: int
) -> dict[str, Any]:
    """Measure blocks and one piece of the same size in turns."""
    stream = torch.cuda.Stream()
    rates: list[list[float]] = [[], []]
    host = []
    for _ in range(ROUNDS):
        for rate, action in zip(rates, (partial(move, blocks), piece), strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record(stream)
            started = time.perf_counter()
            action(stream.cuda_stream)
            if action is not piece:
                host.append(time.perf_counter() - started)
            end.record(stream)
            torch.cuda.synchronize()
            rate.append(total / begin.elapsed_time(end) / 1e6)
    return {
        "GB/s": [round(pick(rates[0]), 1) for pick in (statistics.median, min, max)],
        "GB/s as one piece": [round(pick(rates[1]), 1) for pick in (statistics.median, min, max)],
        "ratio": round(statistics.median(a / b for a, b in zip(*rates, strict=True)), 3),
        "us a block": round(statistics.median(host) * 1e6 / len(blocks.slots), 2),
    }


def both_ways(mover: RawMover, blocks: Blocks, total: int) -> dict[str, float]:
    """Load one half while the other is saved."""
    half = len(blocks.slots) // 2
    first, second = (
        Blocks(blocks.slots[part], blocks.pages[part]) for part in (slice(half), slice(half, None))
    )
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    seconds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        mover.load(first, streams[0].cuda_stream)
        mover.save(second, streams[1].cuda_stream)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {"GB/s, both at once": round(total / statistics.median(seconds) / 1e9, 1)}


def held_up(work: tuple[RawMover, Blocks]) -> list[float]:
    """Return how long the call takes while the stream has 100 ms of other work, and while it has none."""
    mover, blocks = work
    stream = torch.cuda.Stream()
    taken = []
    for busy in (False, True):
        torch.cuda.synchronize()
        if busy:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(170_000_000)
        started = time.perf_counter()
        mover.load(blocks, stream.cuda_stream)
        taken.append(round((time.perf_counter() - started) * 1e3, 2))
    torch.cuda.synchronize()
    return taken


if __name__ == "__main__":
    main()
