"""Warming up: bringing blocks from the bucket into the tier above before anybody asks for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.codec import check_block
from kvtier.errors import CorruptBlock
from kvtier.tiers.base import Buffer, StoredBlock, Tier
from kvtier.tiers.s3.heat import Use
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.lifecycle import upwards
from kvtier.tiers.s3.merge import Verify
from kvtier.tiers.s3.pace import Pace
from kvtier.tiers.s3.pack_view import PackView

_BATCH_BYTES = 64 << 20
_BATCH_SECONDS = 0.5
"""A batch takes about so long where a rate is set: what is fetched at once is a burst."""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Consecutive blocks that are to be brought.

    Attributes:
        hashes: The blocks, in the chain's order.
        parent: The block before the first one, or the chain's root.
        position: Place of the first one in the chain.
        size: Their bytes in the bucket.
    """

    hashes: tuple[bytes, ...]
    parent: bytes
    position: int
    size: int


@dataclass(slots=True)
class Warmed:
    """What was brought: blocks and bytes; `held` were there already, `failed` could not be had."""

    blocks: int = 0
    bytes: int = 0
    held: int = 0
    failed: int = 0


def hottest(index: BlockIndex, uses: Mapping[bytes, Use], now: float, limit: int) -> list[Wanted]:
    """Choose the packs that are used most, each after those that its chain goes through before it.

    Without any heat, the latest packs.

    Args:
        index: All packs.
        uses: Heat, by block.
        now: Seconds since 1970 by the server's clock.
        limit: Bytes of all packs together.
    """
    view = index.packs()
    sizes, positions = view.rows["size"].astype(np.int64), view.rows["position"].astype(np.int64)
    parents = view.holders.find(view.rows["parent"])
    heat = np.zeros(len(sizes))
    used = view.holders.find(np.frombuffer(b"".join(uses), "V16"))
    counts = np.fromiter((use.count_at(now) for use in uses.values()), np.float64, len(uses))
    np.add.at(heat, used[used >= 0], counts[used >= 0])
    for children, above in upwards(positions, parents):
        np.add.at(heat, above, heat[children])
    # Listed later, written later.
    order = np.lexsort((-np.arange(len(heat)), -heat))
    chosen: dict[int, None] = {}
    left = limit
    for place in order.tolist():
        for step in _lineage(place, parents, positions, chosen):
            size = int(sizes[step])
            if step in chosen or not view.served[step]:
                continue
            if size > left:
                return [_whole(index, view, done) for done in chosen]
            chosen[step] = None
            left -= size
    return [_whole(index, view, done) for done in chosen]


def prefix(index: BlockIndex, hashes: Sequence[bytes], root: bytes) -> Wanted | None:
    """Return the leading blocks of a prompt that the bucket has; None if it lacks the first."""
    found = index.locate(hashes[: index.match(hashes)])
    locations = [place for place in found if place is not None]
    if not locations:
        return None
    known = tuple(hashes[: len(locations)])
    return Wanted(known, root, 0, sum(place.length for place in locations))


class Warmer:
    """Copies blocks from one tier to another."""

    def __init__(
        self,
        source: Tier,
        sink: Tier,
        namespace: bytes,
        *,
        bytes_per_second: float | None = None,
        verify: Verify = check_block,
        stop: threading.Event | None = None,
    ):
        """Prepare.

        Args:
            source: The bucket's tier.
            sink: The tier that is filled; what it holds already is not fetched, so an interrupted warm-up
                goes on where it stopped.
            namespace: The namespace's id.
            bytes_per_second: Rate that is not exceeded for long; None: as fast as it goes.
            verify: Checks a block before it is kept.
            stop: Ends it early when it is set.
        """
        self._source = source
        self._sink = sink
        self._namespace = namespace
        self._rate = bytes_per_second
        self._verify = verify
        self._stop = stop or threading.Event()

    def run(self, wanted: Iterable[Wanted], on_bytes: Callable[[int], None] = lambda size: None) -> Warmed:
        """Bring what is wanted, in that order.

        Args:
            wanted: What to bring.
            on_bytes: Called with the bytes of each part that is done, also of those that were there already.
        """
        warmed, pace, rest = Warmed(), Pace(self._rate), 0.0
        limit = _BATCH_BYTES if self._rate is None else min(_BATCH_BYTES, int(self._rate * _BATCH_SECONDS))
        for batch in _batches(wanted, limit):
            if self._stop.wait(rest):
                break
            missing = {
                block.hash: block for part in batch for block in _blocks(part) if not self._holds(block.hash)
            }
            warmed.held += sum(len(part.hashes) for part in batch) - len(missing)
            before = warmed.bytes
            if missing:
                self._bring(missing, warmed)
            on_bytes(sum(part.size for part in batch))
            rest = pace.rest(warmed.bytes - before)
        return warmed

    def _holds(self, block_hash: bytes) -> bool:
        return self._sink.match([block_hash]) == 1

    def _bring(self, missing: Mapping[bytes, StoredBlock], warmed: Warmed) -> None:
        lock = threading.Lock()

        def deliver(block_hash: bytes, payload: Buffer | None) -> None:
            block, kept = missing[block_hash], 0
            if payload is not None and not self._stop.is_set():
                try:
                    self._verify(payload, block_hash, self._namespace)
                    kept = self._sink.write([StoredBlock(block_hash, block.parent, block.position, payload)])
                except CorruptBlock:
                    self._source.discard([block_hash])
            with lock:
                warmed.blocks += kept
                warmed.failed += not kept
                warmed.bytes += len(payload) if payload is not None else 0

        self._source.read(list(missing), deliver)


def _lineage(place: int, parents: Array, positions: Array, chosen: Mapping[int, None]) -> list[int]:
    """Return a pack and those before it in its chain up to one that is chosen, the first of them first."""
    line = [place]
    while (above := int(parents[line[-1]])) >= 0 and positions[above] < positions[line[-1]]:
        if above in chosen:
            break
        line.append(above)
    return line[::-1]


def _whole(index: BlockIndex, view: PackView, place: int) -> Wanted:
    pack = index.pack(view.rows["name"][place].tobytes())
    if pack is None:
        return Wanted((), b"", 0, 0)
    return Wanted(pack.hashes, pack.parent, pack.position, pack.size)


def _blocks(part: Wanted) -> Iterator[StoredBlock]:
    parents = (part.parent, *part.hashes[:-1])
    for place, (block, parent) in enumerate(zip(part.hashes, parents, strict=True)):
        yield StoredBlock(block, parent, part.position + place, b"")


def _batches(wanted: Iterable[Wanted], limit: int) -> Iterator[list[Wanted]]:
    """Group what is wanted into batches of about `limit` bytes: several requests are under way at once."""
    batch: list[Wanted] = []
    size = 0
    for part in wanted:
        for piece in _pieces(part, limit):
            if batch and size + piece.size > limit:
                yield batch
                batch, size = [], 0
            batch.append(piece)
            size += piece.size
    if batch:
        yield batch


def _pieces(part: Wanted, limit: int) -> Iterator[Wanted]:
    """Cut what is wanted into pieces of about `limit` bytes, or of one block where that is more."""
    count = len(part.hashes)
    step = max(1, count * limit // max(part.size, 1))
    done = 0
    for start in range(0, count, step):
        end = min(start + step, count)
        size = part.size * end // count - done
        parent = part.hashes[start - 1] if start else part.parent
        yield Wanted(part.hashes[start:end], parent, part.position + start, size)
        done += size
