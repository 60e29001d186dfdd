"""Write-through: encode committed blocks and hand them to the lower tiers, in the background, bounded."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.codec import BlockCodec
from kvtier.tiers import StoredBlock, Tier
from kvtier.tiers.memory import MemoryTier

_log = logging.getLogger(__name__)

MAX_QUEUED_BYTES = 256 << 20
"""Encoded bytes that may wait for one tier; beyond that encoders wait for it, or it loses blocks."""

_STALL_SECONDS = 5.0
"""A tier that has taken nothing for so long is not waited for."""

_BATCH_BYTES = 64 << 20
"""A tier is given so much at once: before that is taken, nobody sees that a slow one goes on."""

_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class CommittedBlock:
    """A block that lies readable in the arena, pinned for the writer.

    Attributes:
        hash: Its chained hash, 16 bytes.
        parent: The hash before it in the chain, or the chain's root.
        position: Its place in the chain.
        slot: Where it lies.
    """

    hash: bytes
    parent: bytes
    position: int
    slot: int


class _TierQueue:
    """Encoded blocks on their way to one tier, and the thread that writes them.

    Attributes:
        queued_bytes: Their bytes, those that are just being written included.
    """

    def __init__(self, tier: Tier, counters: Counters, is_behind: Callable[[], bool]) -> None:
        """Take a tier, and what says whether too much waits for its encoder to wait for room here, too."""
        self._tier = tier
        self._is_behind = is_behind
        self._progress = 0.0
        self._counters = counters
        self._worker = Workers(f"write-{tier.name}", 1)
        self._changed = threading.Condition()
        self._blocks: deque[StoredBlock] = deque()
        self.queued_bytes = 0
        self._writing = False

    def offer(self, block: StoredBlock, *, wait: bool = False) -> None:
        """Queue a block; where there is no room it is lost, unless `wait` and the tier makes some in time.

        A prompt is encoded faster than disk or bucket take it. Without the blocks that are lost in the
        middle, those behind them are worth nothing.
        """
        size = len(block.payload)
        with self._changed:
            while self.queued_bytes + size > MAX_QUEUED_BYTES:
                left = self._progress + _STALL_SECONDS - time.monotonic()
                if not wait or left <= 0 or self._is_behind():
                    self._counters.add(f"{self._tier.name}_dropped_blocks")
                    return
                self._changed.wait(min(left, _LOOK_SECONDS))
            self.queued_bytes += size
            self._blocks.append(block)
            if self._writing:
                return
            self._writing = True
            self._progress = time.monotonic()
        self._worker.run(self._drain)

    def wait_empty(self, deadline: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._writing, max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float) -> None:
        self._worker.close(timeout)

    def _drain(self) -> None:
        while True:
            with self._changed:
                batch: list[StoredBlock] = []
                size = 0
                while self._blocks and size < _BATCH_BYTES:
                    batch.append(self._blocks.popleft())
                    size += len(batch[-1].payload)
                if not batch:
                    self._writing = False
                    self._changed.notify_all()
                    return
            try:
                self._tier.write(batch)
            except Exception as error:  # noqa: BLE001 - a tier's defect must not end all writing to it
                self._counters.add(f"{self._tier.name}_write_defects")
                log_once(_log, self._tier.name, "writing to %s failed: %r", self._tier.name, error)
            with self._changed:
                self.queued_bytes -= size
                self._progress = time.monotonic()
                self._changed.notify_all()


class WriteThrough:
    """Encodes blocks on a few threads and queues them for every lower tier that lacks them.

    Args:
        memory: The arena that the blocks lie in.
        codec: Encodes them.
        tiers: The lower tiers, fastest first.
        counters: Where to count.
    """

    def __init__(
        self, memory: MemoryTier, codec: BlockCodec, tiers: Sequence[Tier], counters: Counters
    ) -> None:
        self._memory = memory
        self._codec = codec
        self._tiers = tiers
        self._counters = counters
        self._queues = [_TierQueue(tier, counters, self._is_behind) for tier in tiers]
        self._encoders = Workers("encode", max(1, min(8, (os.cpu_count() or 1) // 2)))
        self._changed = threading.Condition()
        self._pinned = 0

    def offer(self, blocks: Sequence[CommittedBlock]) -> None:
        """Take over pinned blocks; what is too much is unpinned at once and counted as dropped."""
        for block in blocks:
            with self._changed:
                # Blocks that wait for their encoder are pinned, and pinned ones make no room for new ones.
                taken = self._pinned < max(1, self._memory.slots // 2)
                self._pinned += taken
            if taken:
                self._encoders.run(partial(self._encode, block))
            else:
                self._memory.unpin([block.slot])
                self._counters.add("encode_dropped_blocks")

    def promote(self, depth: int, block: StoredBlock) -> None:
        """Queue a copy of an encoded block for the tiers above `depth` that lack it."""
        for tier, queue in zip(self._tiers[:depth], self._queues[:depth], strict=True):
            if not tier.match([block.hash]):
                queue.offer(StoredBlock(block.hash, block.parent, block.position, bytes(block.payload)))

    def flush(self, timeout: float) -> bool:
        """Wait until all that was offered is written and durable; False when the time ran out."""
        deadline = time.monotonic() + timeout
        with self._changed:
            done = self._changed.wait_for(lambda: self._pinned == 0, timeout)
        for tier, queue in zip(self._tiers, self._queues, strict=True):
            done = queue.wait_empty(deadline) and done
            done = tier.flush(max(0.0, deadline - time.monotonic())) and done
        return done

    def close(self, timeout: float) -> None:
        """End the threads, waiting up to `timeout` seconds for them."""
        share = timeout / (1 + len(self._queues))
        self._encoders.close(share)
        for queue in self._queues:
            queue.close(share)

    def pending(self) -> tuple[int, int]:
        """Return how many blocks wait for their encoder, and how many encoded bytes for their tier."""
        with self._changed:
            return self._pinned, sum(queue.queued_bytes for queue in self._queues)

    def _is_behind(self) -> bool:
        """Say whether a quarter of the arena waits: it is there for blocks that are read."""
        return self._pinned > self._memory.slots // 4

    def _encode(self, block: CommittedBlock) -> None:
        try:
            lacking = [
                queue
                for tier, queue in zip(self._tiers, self._queues, strict=True)
                if not tier.match([block.hash])
            ]
            if lacking:
                payload = self._codec.encode(block.hash, self._memory.view(block.slot))
                self._counters.add("encoded_raw_bytes", self._codec.layout.block_bytes)
                self._counters.add("encoded_bytes", len(payload))
                for queue in lacking:
                    queue.offer(StoredBlock(block.hash, block.parent, block.position, payload), wait=True)
        finally:
            self._memory.unpin([block.slot])
            with self._changed:
                self._pinned -= 1
                self._changed.notify_all()
