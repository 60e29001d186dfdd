"""Reading blocks: neighbours in one ranged GET, many GETs under way, the front of a prefix first."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.tiers.base import Deliver
from kvtier.tiers.s3.bucket import Bucket, FetchesInTurns, ObjectMissing
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.index import BlockIndex, Location, PackEntry
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lanes import Lanes

_logger = logging.getLogger(__name__)

RANGE_BYTES = (8 << 20, 96 << 20)
"""A range is a read's bytes over all connections, within these: small reads need the connections, large ones
should cost few requests."""
MAX_GAP_BYTES = 64 << 10
"""Blocks closer than this are fetched together: a request costs more than the bytes between."""
_SLOWEST_BYTES_PER_SECOND = 16 << 20
"""A read as a whole that brings less makes no further requests: computing is faster."""
THREADS = max(2, min(8, os.cpu_count() or 1))
"""More of them decode no faster, and spend more on waiting for the GIL and for memory."""


@dataclass(slots=True)
class RangePlan:
    """One ranged GET and the blocks that it brings.

    Attributes:
        pack: The pack to read.
        offset: First byte.
        length: Bytes.
        blocks: Where the blocks lie, in the order of their offsets.
    """

    pack: PackEntry
    offset: int
    length: int
    blocks: list[Location] = field(default_factory=list)


def plan_ranges(locations: Sequence[Location], concurrency: int) -> list[RangePlan]:
    """Group blocks into ranged GETs, about as many as can be under way at once.

    Args:
        locations: Blocks in the order in which they are wanted.
        concurrency: Requests that can be under way at once.

    Returns:
        Ranges, in the order of the first block that was wanted of each pack.
    """
    size = sum(location.length for location in locations)
    longest = min(max(size // concurrency, RANGE_BYTES[0]), RANGE_BYTES[1])
    by_pack: dict[bytes, list[Location]] = {}
    for location in locations:
        by_pack.setdefault(location.pack.name, []).append(location)
    plans: list[RangePlan] = []
    for group in by_pack.values():
        plan: RangePlan | None = None
        for location in sorted(group, key=lambda place: place.offset):
            end = location.offset + location.length
            if (
                plan is None
                or location.offset - (plan.offset + plan.length) > MAX_GAP_BYTES
                or end - plan.offset > longest
            ):
                plan = RangePlan(location.pack, location.offset, location.length)
                plans.append(plan)
            plan.length = end - plan.offset
            plan.blocks.append(location)
    return plans


class _Buffer:
    """Where the blocks of one range arrive, one after the other."""

    def __init__(self) -> None:
        self._kept = memoryview(b"")

    def room(self, length: int) -> memoryview:
        """Return the same memory again: pages that have been touched once are not cleared again."""
        if len(self._kept) < length:
            self._kept = memoryview(bytearray(length))
        return self._kept[:length]


class _Spare(threading.local):
    """A thread's buffers that no range uses now; they go with the thread."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []


class BlockReader:
    """Fetches blocks with a few threads that all reads share."""

    def __init__(
        self,
        bucket: Bucket,
        keys: Keys,
        index: BlockIndex,
        health: Health,
        counters: Counters,
        concurrency: int,
        patience: float,
    ):
        """Prepare the threads; they start when they are needed.

        Args:
            bucket: Where the packs are.
            keys: Names of the objects.
            index: Knows where the blocks are.
            health: Of the reading direction.
            counters: Gets what happened.
            concurrency: GETs under way at once, of all reads together.
            patience: Seconds after which a read makes no further requests, besides a second for 16 MiB.
        """
        self._bucket = bucket
        self._keys = keys
        self._index = index
        self._health = health
        self._counters = counters
        # A bucket whose requests take no turns needs a thread for each.
        self._fetch_parts = bucket.fetch_parts if isinstance(bucket, FetchesInTurns) else None
        self._lanes = Lanes("s3-read", THREADS if self._fetch_parts else concurrency, concurrency)
        self._concurrency = concurrency
        self._patience = patience
        self._spare = _Spare()

    def read(self, hashes: Sequence[bytes], deliver: Deliver) -> None:
        """Deliver every block of `hashes`, None for those that cannot be had; see `Tier.read`."""
        located = self._index.locate(hashes)
        if self._health.breaker.is_open:
            located = [None] * len(hashes)
        plans = plan_ranges([location for location in located if location is not None], self._concurrency)
        size = sum(plan.length for plan in plans)
        deadline = time.monotonic() + self._patience + size / _SLOWEST_BYTES_PER_SECOND
        waiting = [deque(plan.blocks) for plan in plans]
        futures = [
            self._lanes.submit(partial(self._fetch, plan, blocks, deliver, deadline))
            for plan, blocks in zip(plans, waiting, strict=True)
        ]
        for block_hash, location in zip(hashes, located, strict=True):
            if location is None:
                self._deliver(deliver, block_hash, None)
        for blocks, future in zip(waiting, futures, strict=True):
            failure = _failure(future)
            if failure is not None:
                log_once(_logger, "fetch", "blocks were not fetched: %r", failure)
            self._miss(blocks, deliver)

    def close(self) -> None:
        """Take no more requests; those under way run into their time-outs at worst."""
        self._lanes.close()

    async def _fetch(
        self, plan: RangePlan, waiting: deque[Location], deliver: Deliver, deadline: float
    ) -> None:
        """Deliver a range block by block as it arrives: what has come is decoded while the rest is coming."""
        if time.monotonic() > deadline:
            self._counters.add("late_ranges")
        elif not self._health.breaker.is_open:
            buffer = self._spare.buffers.pop() if self._spare.buffers else _Buffer()
            await self._receive(plan, self._parts(plan, waiting, deliver, buffer))
            self._spare.buffers.append(buffer)
        self._miss(waiting, deliver)

    async def _receive(self, plan: RangePlan, parts: Iterator[memoryview]) -> None:
        try:
            with self._health.watched():
                key = self._keys.pack(plan.pack.name)
                if self._fetch_parts is not None:
                    await self._fetch_parts(key, plan.offset, plan.length, parts)
                else:
                    self._bucket.get_parts(key, plan.offset, plan.length, parts)
        except ObjectMissing:
            self._index.forget(plan.pack)
        except Exception:  # noqa: BLE001 - counted and logged by `watched`; a miss whatever it was
            self._counters.add("failed_ranges")

    def _parts(
        self, plan: RangePlan, waiting: deque[Location], deliver: Deliver, buffer: _Buffer
    ) -> Generator[memoryview, None, None]:
        """Give a buffer for each block of a range, and for the gaps; deliver each block when it is full."""
        end = plan.offset
        payload = buffer.room(0)
        for location in plan.blocks:
            if location.offset > end:
                yield buffer.room(location.offset - end)
            # A block that was asked for twice is fetched once.
            if location.offset >= end:
                payload = buffer.room(location.length)
                yield payload
            waiting.popleft()
            self._deliver(deliver, location.hash, payload.toreadonly())
            end = location.offset + location.length

    def _miss(self, waiting: deque[Location], deliver: Deliver) -> None:
        while waiting:
            self._deliver(deliver, waiting.popleft().hash, None)

    def _deliver(self, deliver: Deliver, block_hash: bytes, payload: memoryview | None) -> None:
        self._counters.add("blocks_missed" if payload is None else "blocks_read")
        try:
            deliver(block_hash, payload)
        except Exception as error:  # noqa: BLE001 - the caller's defect; the other blocks go on
            self._counters.add("errors_deliver")
            log_once(_logger, "deliver", "a receiver of blocks failed: %r", error)


def _failure(future: Future[None]) -> BaseException | None:
    """Wait for a fetch; return what went wrong, None too where the closing tier cancelled it."""
    try:
        return future.exception()
    except CancelledError:
        return None
