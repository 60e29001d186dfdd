"""The store: arena, disk and bucket behind one lookup."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.codec import BlockCodec, RawSlots, SlotForm, slot_form
from kvtier.config import Config
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store.base import Granted, Match, Reservation, Run, ticket_slot
from kvtier.store.leases import LeaseTable
from kvtier.store.opening import open_tiers
from kvtier.store.staging import Stager
from kvtier.store.writing import CommittedBlock, WriteThrough
from kvtier.tiers import NotesUse, Tier
from kvtier.tiers.memory import MemoryTier

_log = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""Time from a lookup to the order to load, which lie in one engine iteration; a minute is far beyond any."""


@dataclass(slots=True)
class Lookup:
    """A match that has begun.

    Attributes:
        hashes: What is looked for.
        slots: Of the leading run that is resident; pinned.
        origin: The blocks after these that are being fetched, in order, and from which tier.
    """

    hashes: Sequence[bytes]
    slots: list[int] = field(default_factory=list)
    origin: dict[bytes, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Reservation:
    """A block that is being filled.

    Attributes:
        hash: The block's hash.
        parent: The hash before it.
        position: Its place in the chain.
        owner: Who alone can commit it or give it up; and for `drop_owner`.
        writing: A bit for each shard that has not said how its copy ended.
        failed: Whether one of them gave up.
    """

    hash: bytes
    parent: bytes
    position: int
    owner: int
    writing: int
    failed: bool = False


class TieredStore:
    """Implements `kvtier.store.StoreClient` in this process.

    Args:
        namespace: What the blocks are blocks of.
        layout: How their bytes are arranged.
        memory: The arena; the store closes it.
        tiers: The lower tiers, fastest first; the store closes them.
        form: How blocks lie in the arena's slots, raw by default.
        lookup_wait: Seconds that `match` waits at most unless told otherwise.
        clock: Monotonic seconds, for leases.
    """

    def __init__(
        self,
        namespace: Namespace,
        layout: BlockLayout,
        memory: MemoryTier,
        tiers: Sequence[Tier] = (),
        *,
        form: SlotForm | None = None,
        lookup_wait: float = 0.05,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.namespace = namespace
        self.layout = layout
        self.form = form if form is not None else RawSlots(layout)
        self._raw = isinstance(self.form, RawSlots)
        self.memory = memory
        self._tiers = tuple(tiers)
        self._note_use = [tier.note_use for tier in tiers if isinstance(tier, NotesUse)]
        self._lookup_wait = lookup_wait
        self._counters = Counters()
        codec = BlockCodec(layout, namespace.id, self.form)
        self._leases = LeaseTable(memory, LEASE_SECONDS, clock)
        self._writer = WriteThrough(memory, codec, self._tiers, self._counters)
        self._stager = Stager(memory, self._tiers, codec, self._counters, self._writer.promote)
        self._clock = clock
        self._lock = threading.Lock()
        self._filling: dict[int, _Reservation] = {}
        # Reservations of processes that died, and until when their copies may still be under way.
        self._dying: list[tuple[float, list[int]]] = []
        self._closed = False

    @classmethod
    def open(cls, config: Config, namespace: Namespace, layout: BlockLayout) -> TieredStore:
        """Build the tiers that `config` declares, and the store over them.

        Raises:
            ConfigError: The arena is too small for one block, or a credential variable is unset.
        """
        form = slot_form(layout, config.memory.format)
        memory = MemoryTier(config.memory.size, form.slot_bytes)
        tiers = open_tiers(config, namespace, layout)
        return cls(namespace, layout, memory, tiers, form=form, lookup_wait=config.lookup_wait)

    def match(
        self,
        hashes: Sequence[bytes],
        wait: float | None = None,
        block_cost: float | None = None,
        ask_again: float = 0.0,
    ) -> Match:
        """Find, stage and lease; see `StoreClient.match`."""
        wait = self._lookup_wait if wait is None else wait
        # On a machine with much else to do the beginning takes its time, too.
        deadline = time.monotonic() + wait
        lookup = self.look_up(hashes, wait + ask_again, block_cost)
        return self.finish(lookup, max(0.0, deadline - time.monotonic()), block_cost, ask_again)

    def look_up(
        self, hashes: Sequence[bytes], wait: float = math.inf, block_cost: float | None = None
    ) -> Lookup:
        """Begin a match: pin what is resident, and start fetching what follows, if it pays. Does not wait.

        Whoever begins one ends it with `finish`.
        """
        if self._closed or not hashes:
            return Lookup(())
        self.expire()
        self._counters.add("lookups")
        slots = self.memory.acquire(hashes)
        missing = hashes[len(slots) :]
        try:
            origin = self._stager.stage(missing, wait, block_cost) if missing and self._tiers else {}
        except BaseException:
            self.memory.unpin(slots)
            raise
        return Lookup(hashes, slots, origin)

    def finish(
        self,
        lookup: Lookup,
        wait: float,
        block_cost: float | None = None,
        ask_again: float = 0.0,
        *,
        holders: int | None = None,
        owner: int = 0,
    ) -> Match:
        """End a match: wait for what is under way, and lease what is there.

        Args:
            lookup: From `look_up`.
            wait: Seconds to wait at most.
            block_cost: Seconds that computing a block takes, if known.
            ask_again: Seconds that the caller can wait further, by asking again.
            holders: How many ranks have to release the lease; None: one for each shard.
            owner: Whose the lease is, for `drop_owner`.
        """
        try:
            return self._lease(lookup, wait, block_cost, ask_again, holders or self.layout.shards, owner)
        except BaseException:
            self.memory.unpin(lookup.slots)
            raise

    def _lease(
        self,
        lookup: Lookup,
        wait: float,
        block_cost: float | None,
        ask_again: float,
        holders: int,
        owner: int,
    ) -> Match:
        hashes, slots, origin = lookup.hashes, lookup.slots, lookup.origin
        sources = {"memory": len(slots)} if slots else {}
        if origin:
            missing = list(origin)
            self._stager.wait(missing, wait, block_cost)
            left = self._stager.patience(missing, ask_again, block_cost) if ask_again else 0.0
            if left:
                self.memory.unpin(slots)
                slots.clear()
                for tier in origin.values():
                    sources[tier] = sources.get(tier, 0) + 1
                return Match(sources=sources, ask_again=left)
            arrived = self.memory.acquire(missing)
            for block in missing[: len(arrived)]:
                sources[origin[block]] = sources.get(origin[block], 0) + 1
            slots += arrived
        for tier, blocks in sources.items():
            self._counters.add(f"hit_blocks_{tier}", blocks)
        self._counters.add("missed_blocks", len(hashes) - len(slots))
        if not slots:
            return Match()
        for note_use in self._note_use:
            note_use(hashes[len(slots) - 1])
        lease = self._leases.grant(tuple(slots), holders, owner)
        return Match(lease, tuple(slots), sources)

    def hold(self, lease: int, *, owner: int = 0) -> float:
        """Take a lease of `owner` into use; see `StoreClient.hold`."""
        return math.inf if self._leases.hold(lease, owner) else 0.0

    def release(self, lease: int, shard: int | None = None, *, owner: int = 0) -> None:
        """Give a lease of `owner` up; see `StoreClient.release`."""
        self._leases.release(lease, shard, owner)

    def reserve(self, parent: bytes, position: int, hashes: Sequence[bytes]) -> list[int | None]:
        """Reserve slots for new blocks; see `StoreClient.reserve`."""
        (tickets,) = self.reserve_runs([Run(parent, position, hashes)])
        return tickets

    def reserve_soon(self, runs: Sequence[Run]) -> list[Reservation]:
        """Reserve slots for several runs; see `StoreClient.reserve_soon`."""
        return [Granted(tickets, self.abort) for tickets in self.reserve_runs(runs)]

    def reserve_runs(self, runs: Sequence[Run], *, owner: int = 0) -> list[list[int | None]]:
        """Reserve slots for the blocks of several runs, for `owner`; see `StoreClient.reserve`."""
        if self._closed:
            return [[None] * len(run.hashes) for run in runs]
        self.expire()
        tickets = self.memory.reserve([block for run in runs for block in run.hashes])
        all_shards = (1 << self.layout.shards) - 1
        granted: list[list[int | None]] = []
        start = without_room = 0
        with self._lock:
            for before, position, hashes in runs:
                own = tickets[start : start + len(hashes)]
                for place, (block, ticket) in enumerate(zip(hashes, own, strict=True), position):
                    if ticket is not None:
                        self._filling[ticket] = _Reservation(block, before, place, owner, all_shards)
                    elif self.memory.state(block) == "absent":
                        without_room += 1
                    before = block
                start += len(hashes)
                granted.append(own)
        if without_room:
            self._counters.add("save_skipped_blocks", without_room)
        return granted

    def commit(self, tickets: Sequence[int], shard: int = 0, *, owner: int = 0) -> None:
        """Note one shard's bytes as in place; see `StoreClient.commit`."""
        self._settle(tickets, shard, owner, written=True)

    def abort(self, tickets: Sequence[int], shard: int | None = None, *, owner: int = 0) -> None:
        """Give reservations of `owner` up; see `StoreClient.abort`."""
        if shard is not None:
            self._settle(tickets, shard, owner, written=False)
            return
        known: list[int] = []
        with self._lock:
            for ticket in tickets:
                entry = self._filling.get(ticket)
                if entry is not None and entry.owner == owner:
                    del self._filling[ticket]
                    known.append(ticket)
        self.memory.abort(known)

    def _settle(self, tickets: Sequence[int], shard: int, owner: int, *, written: bool) -> None:
        """Note how one shard's copies ended. The last shard publishes a block, or frees its slot."""
        whole: list[int] = []
        entries: list[_Reservation] = []
        given_up: list[int] = []
        bit = 1 << shard
        with self._lock:
            for ticket in tickets:
                entry = self._filling.get(ticket)
                if entry is None or entry.owner != owner or not entry.writing & bit:
                    continue
                entry.writing -= bit
                entry.failed |= not written
                if entry.writing:
                    continue
                del self._filling[ticket]
                if entry.failed:
                    given_up.append(ticket)
                else:
                    whole.append(ticket)
                    entries.append(entry)
        if not self._raw:
            unfit = [place for place, ticket in enumerate(whole) if not self._fits(ticket_slot(ticket))]
            for place in reversed(unfit):
                given_up.append(whole.pop(place))
                del entries[place]
            if unfit:
                self._counters.add("unfit_blocks", len(unfit))
        if given_up:
            self.memory.abort(given_up)
        if not whole:
            return
        # Pinned for the writer, before anybody can see them.
        published = self.memory.publish(whole, pin=bool(self._tiers))
        self._counters.add("saved_blocks", sum(published))
        if self._tiers:
            blocks = [
                CommittedBlock(entry.hash, entry.parent, entry.position, ticket_slot(ticket))
                for ticket, entry in compress(zip(whole, entries, strict=True), published)
            ]
            self._writer.offer(blocks)

    def _fits(self, slot: int) -> bool:
        """Say whether the shards in a slot say that the form of the slots could hold them."""
        try:
            return self.form.whole(self.memory.view(slot))
        except ValueError:
            # Closed meanwhile.
            return False

    def drop_owner(self, owner: int, seconds: float = 0.0) -> None:
        """End the leases and reservations of one owner, whose processes are gone.

        Args:
            owner: The owner.
            seconds: How long copies into its reserved slots may go on without it: until then nobody gets
                them. Copies from slots that it has leased may go on too, and harm nobody.
        """
        self._leases.end_all(owner)
        with self._lock:
            tickets = [ticket for ticket, entry in self._filling.items() if entry.owner == owner]
            for ticket in tickets:
                del self._filling[ticket]
            if tickets:
                self._dying.append((self._clock() + seconds, tickets))
        self.expire()

    def expire(self) -> None:
        """Free what has had its time: leases that are not held, slots of processes that died."""
        self._leases.expire()
        if not self._dying:
            return
        with self._lock:
            now = self._clock()
            over = [tickets for until, tickets in self._dying if until <= now]
            self._dying = [entry for entry in self._dying if entry[0] > now]
        for tickets in over:
            self.memory.abort(tickets)

    def slot_view(self, slot: int, shard: int = 0) -> memoryview:
        """Return one shard's bytes of a slot; see `StoreClient.slot_view`."""
        size = self.form.shard_bytes
        return self.memory.view(slot)[shard * size : (shard + 1) * size]

    def flush(self, timeout: float) -> bool:
        """Wait until everything committed so far is durable in all lower tiers, or `timeout` seconds."""
        return self._writer.flush(timeout)

    def stats(self) -> Mapping[str, int | float]:
        """Return the store's counters, and each tier's under its name; see `StoreClient.stats`."""
        values = self._counters.snapshot()
        values["leases"] = len(self._leases)
        values["leases_expired"] = self._leases.expired
        values["filling_slots"] = len(self._filling)
        values["dying_slots"] = sum(len(tickets) for _, tickets in self._dying)
        values["encoding_blocks"], values["queued_bytes"] = self._writer.pending()
        for tier in (self.memory, *self._tiers):
            values.update({f"{tier.name}_{name}": value for name, value in tier.stats().items()})
        return values

    def close(self, timeout: float = 10.0) -> None:
        """Flush within `timeout` seconds, then close the tiers; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        deadline = time.monotonic() + timeout
        if not self._writer.flush(timeout):
            log_once(_log, "close", "closed before everything was written: %d s ran out", int(timeout))
        remaining = max(0.5, deadline - time.monotonic())
        self._stager.close(remaining / 4)
        self._writer.close(remaining / 4)
        for tier in self._tiers:
            tier.close(remaining / 2)
        self.memory.close()
