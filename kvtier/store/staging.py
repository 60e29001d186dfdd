"""Staging: bring blocks from disk or bucket into the arena, decoded and verified, in the background."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.codec import BlockCodec, StoredFile
from kvtier.errors import CorruptBlock, SlotMisfit
from kvtier.store.base import ticket_slot
from kvtier.store.gate import Pace, patience
from kvtier.tiers import Buffer, ReadsFiles, StoredBlock, Tier
from kvtier.tiers.memory import MemoryTier

_log = logging.getLogger(__name__)

READERS_PER_TIER = 8
"""Stagings that one tier reads at the same time; each read is itself concurrent inside the tier."""

STALL_SECONDS = 0.25
"""A tier that has reads under way and delivered nothing for so long is not waited for."""

_ASK_BLOCKS = 16
"""A tier is asked for so many blocks at first, and for four times as many whenever it holds them all."""

_TRUST_SECONDS = 5.0
"""How long the pace of a tier's last read is trusted. After that blocks are fetched to learn it anew."""

Promote = Callable[[int, StoredBlock], None]


@dataclass(slots=True)
class _Lane:
    """One lower tier and what is under way from it."""

    tier: Tier
    workers: Workers
    pace: Pace = field(default_factory=Pace)
    seen: float = -math.inf
    in_flight: int = 0
    progress: float = 0.0

    def pays(self, blocks: int, wait: float, block_cost: float | None) -> bool:
        """Say whether any block of a read would be waited for; what is computed instead comes by itself."""
        if block_cost is None or time.monotonic() > self.seen + _TRUST_SECONDS:
            return True
        return patience([self.pace.arrival(place) for place in range(blocks)], wait, block_cost) > 0.0


class _Fetch:
    """Blocks asked of one tier in one read.

    Attributes:
        lane: The tier.
        tickets: Each hash's ticket until it is delivered.
        places: Each hash's place in the read.
        failed: What could not be delivered.
        begun: When the read was ordered, on `time.monotonic`'s clock.
        landed: When blocks landed.
    """

    __slots__ = ("begun", "failed", "landed", "lane", "places", "tickets")

    def __init__(self, lane: _Lane, tickets: dict[bytes, int]) -> None:
        self.lane = lane
        self.tickets = tickets
        self.places = {block: place for place, block in enumerate(tickets)}
        self.failed: list[tuple[bytes, int]] = []
        self.begun = time.monotonic()
        self.landed: list[float] = []

    def expected(self, block: bytes) -> float:
        return self.begun + self.lane.pace.arrival(self.places[block])

    def end(self) -> None:
        if self.landed:
            # Threads land blocks side by side: their times need not be in order.
            first, last = min(self.landed), max(self.landed)
            self.lane.pace.saw(len(self.landed), first - self.begun, last - self.begun)
            self.lane.seen = last


class Stager:
    """Fetches blocks into reserved slots; concurrent callers share one fetch of a block.

    Args:
        memory: The arena.
        tiers: The lower tiers, fastest first.
        codec: Verifies and decodes what they hand out.
        counters: Where to count.
        promote: Called with the depth (index in `tiers`) that a verified block came from and its encoded
            form, so that the tiers above can keep it. The payload is valid only during the call.
    """

    def __init__(
        self,
        memory: MemoryTier,
        tiers: Sequence[Tier],
        codec: BlockCodec,
        counters: Counters,
        promote: Promote,
    ) -> None:
        self._memory = memory
        self._codec = codec
        self._counters = counters
        self._promote = promote
        self._lanes = [_Lane(tier, Workers(f"stage-{tier.name}", READERS_PER_TIER)) for tier in tiers]
        self._changed = threading.Condition()
        self._flights: dict[bytes, _Fetch] = {}
        self._awaited: Counter[bytes] = Counter()

    def stage(
        self, hashes: Sequence[bytes], wait: float = math.inf, block_cost: float | None = None
    ) -> dict[bytes, str]:
        """Start fetching the leading run of `hashes` that the lower tiers hold, as far as it pays.

        Args:
            hashes: Blocks of one run, in order.
            wait: Seconds that they are waited for at most.
            block_cost: Seconds that computing a block takes, if known.

        Returns:
            The blocks of that run, in order, with the name of the tier each is being fetched from, or
            "memory" for those that lie in the arena by now.
        """
        with self._changed:
            here = self._memory.ready(hashes)
            here.update(block for block in hashes if block in self._flights)
        places = [place for place, block in enumerate(hashes) if block not in here]
        depths = self._depths([hashes[place] for place in places], wait, block_cost)
        run = hashes[: places[len(depths)]] if len(depths) < len(places) else hashes
        holders = {hashes[place]: depth for place, depth in zip(places, depths, strict=False)}
        with self._changed:
            # All of the run is named: what it has in the arena makes no room for the rest.
            tickets = self._memory.reserve(run) if depths else [None] * len(run)
            origin, fetches = self._order(run, tickets, holders)
        for depth, fetch in fetches.items():
            self._start(depth, fetch)
        return origin

    def _depths(self, blocks: Sequence[bytes], wait: float, block_cost: float | None) -> list[int]:
        """Return the depth of the tier that each of the leading `blocks` is to be fetched from.

        One that no tier holds ends it, and so does the first of a tier that is not worth waiting for.
        """
        depths: list[int] = []
        while len(depths) < len(blocks):
            for depth, lane in enumerate(self._lanes):
                run = _leading(lane.tier, blocks, len(depths))
                if run:
                    depths += [depth] * run
                    break
            else:
                break
        for depth, lane in enumerate(self._lanes):
            count = depths.count(depth)
            if count and not lane.pays(count, wait, block_cost):
                self._counters.add(f"{lane.tier.name}_passed_over_blocks", count)
                depths = depths[: depths.index(depth)]
        return depths

    def _order(
        self, run: Sequence[bytes], tickets: Sequence[int | None], holders: Mapping[bytes, int]
    ) -> tuple[dict[bytes, str], dict[int, _Fetch]]:
        """Say where the leading blocks of a run come from, and make one read of those that had no slot yet.

        A block that somebody else is filling ends it, and so does the end of the room in the arena. The
        lock is held.

        Args:
            run: The blocks.
            tickets: Those that slots were reserved for just now.
            holders: From which tier they are to be fetched, by its depth.

        Returns:
            The name of each block's tier, and the reads to be started, by depth.
        """
        ready = self._memory.ready(run)
        origin: dict[bytes, str] = {}
        granted: dict[int, dict[bytes, int]] = {}
        own: set[int] = set()
        for block, ticket in zip(run, tickets, strict=True):
            flight, depth = self._flights.get(block), holders.get(block)
            if flight is not None:
                origin[block] = flight.lane.tier.name
            elif ticket is not None and depth is not None:
                origin[block] = self._lanes[depth].tier.name
                granted.setdefault(depth, {})[block] = ticket
                own.add(ticket)
            elif block in ready:
                origin[block] = "memory"
            elif block not in origin:
                break
        self._memory.abort([ticket for ticket in tickets if ticket is not None and ticket not in own])
        fetches = {depth: _Fetch(self._lanes[depth], blocks) for depth, blocks in granted.items()}
        for fetch in fetches.values():
            self._flights.update(dict.fromkeys(fetch.tickets, fetch))
        return origin, fetches

    def wait(self, hashes: Sequence[bytes], wait: float, block_cost: float | None = None) -> None:
        """Wait until `hashes` have arrived, one of them failed, its tier stalls, or waiting pays no more.

        Args:
            hashes: Blocks of one run, in order.
            wait: Seconds to wait at most.
            block_cost: Seconds that computing a block takes, if known.
        """
        arrived = 0
        with self._changed:
            deadline = time.monotonic() + patience(self._arrivals(hashes), wait, block_cost)
            while arrived < len(hashes):
                fetch = self._flights.get(hashes[arrived])
                if fetch is None:
                    if self._memory.state(hashes[arrived]) != "ready":
                        return
                    arrived += 1
                    continue
                left = min(deadline, fetch.lane.progress + STALL_SECONDS) - time.monotonic()
                if left <= 0:
                    return
                self._await(hashes[-1] if hashes[-1] in self._flights else hashes[arrived], left)

    def _await(self, block: bytes, timeout: float) -> None:
        """Wait until a block has landed, any has failed, or `timeout` seconds have passed; under the lock."""
        self._awaited[block] += 1
        self._changed.wait(timeout)
        self._awaited[block] -= 1
        if not self._awaited[block]:
            del self._awaited[block]

    def patience(self, hashes: Sequence[bytes], wait: float, block_cost: float | None = None) -> float:
        """Return how many seconds waiting for `hashes` would pay now, 0.0 if none of them is on its way.

        Args:
            hashes: Blocks of one run, in order.
            wait: Seconds to wait at most.
            block_cost: Seconds that computing a block takes, if known.
        """
        with self._changed:
            if not any(block in self._flights for block in hashes):
                return 0.0
            return patience(self._arrivals(hashes), wait, block_cost)

    def _arrivals(self, hashes: Sequence[bytes]) -> list[float]:
        """Return when each block of a run is expected, in seconds from now, as far as it is under way."""
        now = time.monotonic()
        arrivals: list[float] = []
        latest = 0.0
        for block in hashes:
            fetch = self._flights.get(block)
            if fetch is not None:
                latest = max(latest, fetch.expected(block) - now)
            elif self._memory.state(block) != "ready":
                break
            arrivals.append(latest)
        return arrivals

    def close(self, timeout: float) -> None:
        """End the threads; what is under way is given `timeout` seconds."""
        for lane in self._lanes:
            lane.workers.close(timeout / len(self._lanes))

    def _start(self, depth: int, fetch: _Fetch) -> None:
        lane = self._lanes[depth]
        with self._changed:
            if lane.in_flight == 0:
                lane.progress = time.monotonic()
            lane.in_flight += 1
        lane.workers.run(lambda: self._read(depth, fetch))

    def _read(self, depth: int, fetch: _Fetch) -> None:
        lane = self._lanes[depth]

        def deliver(block: bytes, payload: Buffer | StoredFile | None) -> None:
            # Whoever takes the ticket out owns the slot: a second delivery must not touch it.
            ticket = fetch.tickets.pop(block, None)
            if ticket is None:
                return
            landed = False
            try:
                landed = payload is not None and self._land(fetch, block, ticket, payload)
            finally:
                if not landed:
                    fetch.failed.append((block, ticket))
            if landed and payload is not None and depth:
                whole = payload.read() if isinstance(payload, StoredFile) else payload
                self._promote(depth, StoredBlock(block, bytes(len(block)), 0, whole))

        try:
            if isinstance(lane.tier, ReadsFiles):
                lane.tier.read_files(list(fetch.tickets), deliver)
            else:
                lane.tier.read(list(fetch.tickets), deliver)
        finally:
            while fetch.tickets:
                fetch.failed.append(fetch.tickets.popitem())
            with self._changed:
                lane.in_flight -= 1
                fetch.end()
            self._fall_through(depth, fetch.failed)

    def _land(self, fetch: _Fetch, block: bytes, ticket: int, payload: Buffer | StoredFile) -> bool:
        lane = fetch.lane
        try:
            self._codec.decode(block, payload, self._memory.view(ticket_slot(ticket)))
        except CorruptBlock as error:
            self._counters.add(f"{lane.tier.name}_corrupt_blocks")
            log_once(_log, lane.tier.name, "a block from %s is corrupt: %s", lane.tier.name, error)
            lane.tier.discard([block])
            return False
        except SlotMisfit as error:
            self._counters.add("unfit_blocks")
            log_once(_log, "misfit", "a block from %s stays there: %s", lane.tier.name, error)
            return False
        self._memory.publish([ticket])
        self._counters.add(f"{lane.tier.name}_staged_blocks")
        with self._changed:
            lane.progress = time.monotonic()
            fetch.landed.append(lane.progress)
            self._flights.pop(block, None)
            # Not for each block of a run: whoever waits would take the interpreter from those that decode.
            if block in self._awaited:
                self._changed.notify_all()
        return True

    def _fall_through(self, depth: int, failed: list[tuple[bytes, int]]) -> None:
        """Ask the next tiers for what this one failed to deliver; give the rest up."""
        for below in range(depth + 1, len(self._lanes)):
            lane = self._lanes[below]
            held = {block: ticket for block, ticket in failed if lane.tier.match([block])}
            if held:
                fetch = _Fetch(lane, held)
                with self._changed:
                    self._flights.update(dict.fromkeys(held, fetch))
                self._start(below, fetch)
                failed = [entry for entry in failed if entry[0] not in held]
        if failed:
            self._memory.abort([ticket for _, ticket in failed])
            self._counters.add("staging_failed_blocks", len(failed))
            with self._changed:
                for block, _ in failed:
                    self._flights.pop(block, None)
                self._changed.notify_all()


def _leading(tier: Tier, blocks: Sequence[bytes], start: int) -> int:
    """Return how many of `blocks`, from `start` on, a tier holds; in time that goes with the answer."""
    found, size = 0, _ASK_BLOCKS
    while part := blocks[start + found : start + found + size]:
        run = tier.match(part)
        found += run
        if run < len(part):
            break
        size *= 4
    return found
