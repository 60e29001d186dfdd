"""The store client that speaks to the node agent."""

from __future__ import annotations

import json
import math
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from kvtier._counters import Counters
from kvtier.agent import wire
from kvtier.agent.dialler import Dialler
from kvtier.agent.epochs import of_epoch, slots_of_epoch, split, tickets_by_epoch
from kvtier.agent.launch import launch
from kvtier.agent.link import Link, State
from kvtier.agent.mapping import Mappings, Prepare
from kvtier.agent.place import agent_directory
from kvtier.agent.reservations import Reservations
from kvtier.codec import SlotForm, slot_form
from kvtier.config import Config
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store.base import Match, Reservation, Run
from kvtier.store.tiered import LEASE_SECONDS

CONNECT_SECONDS = 30.0
"""How long `connect` waits for the agent; the client works as soon as there is one, also later."""

CERTAIN_SECONDS = 30.0
"""What is left at least of a lease that is used although the agent did not answer."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long calls wait for the agent.

    Attributes:
        match: Seconds beyond those that the lookup itself may wait.
        call: Seconds that every other call waits.
    """

    match: float = 0.1
    call: float = 0.1


class AgentClient:
    """Implements `kvtier.store.StoreClient` with the store of an agent.

    Slots, tickets and leases carry the epoch that they are of, in their upper bits. Those of an epoch that
    has ended (the agent's process died) mean nothing to the next agent and are never sent to it; slots of
    such an epoch stay readable for a lease's term.

    While the agent cannot be used every lookup is a miss, nothing is reserved, and no call waits.
    """

    def __init__(
        self,
        namespace: Namespace,
        layout: BlockLayout,
        link: Link,
        mappings: Mappings,
        counters: Counters,
        *,
        form: SlotForm,
        lookup_wait: float,
        deadlines: Deadlines,
        clock: Callable[[], float],
    ) -> None:
        self.namespace = namespace
        self.layout = layout
        self.form = form
        self._link = link
        self._mappings = mappings
        self._counters = counters
        self._lookup_wait = lookup_wait
        self._deadlines = deadlines
        self._clock = clock
        self._reservations = Reservations(link, counters, lambda: self._deadlines.call, clock)
        link.tend = self._tend
        # Until when a lease that is not held is certain, by this clock; the oldest first.
        self._certain: dict[int, float] = {}
        self._certain_lock = threading.Lock()

    @property
    def connected(self) -> bool:
        """Whether the agent can be used at present."""
        return self._link.state is State.UP

    def wait_connected(self, timeout: float) -> bool:
        """Wait until the agent can be used, or `timeout` seconds."""
        return self._link.wait_up(timeout)

    def match(
        self,
        hashes: Sequence[bytes],
        wait: float | None = None,
        block_cost: float | None = None,
        ask_again: float = 0.0,
    ) -> Match:
        """Find and lease blocks; see `StoreClient.match`."""
        if not hashes:
            return Match()
        wait = wire.bounded_wait(self._lookup_wait if wait is None else wait)
        asked_for = b"".join(hashes[: wire.MAX_BLOCKS])
        request = wire.MatchBlocks(0, 0, asked_for, wait, block_cost or 0.0, wire.bounded_wait(ask_again))
        asked = self._clock()
        answer = self._link.call(request, wait + self._deadlines.match)
        if answer is None:
            self._counters.add("client_missed_lookups")
            return Match()
        epoch, reply = answer
        if not isinstance(reply, wire.Matched):
            return Match()
        if not reply.lease:
            return Match(sources=reply.sources, ask_again=reply.ask_again)
        lease = of_epoch(epoch, reply.lease)
        self._note(lease, asked + LEASE_SECONDS)
        return Match(lease, slots_of_epoch(epoch, reply.slots), reply.sources)

    def hold(self, lease: int) -> float:
        """Take a lease into use; see `StoreClient.hold`.

        Where the agent does not answer, a lease of this client may be used that has `CERTAIN_SECONDS` left:
        until it is over, and no longer.
        """
        asked = self._clock()
        epoch, number = split(lease)
        answer = self._link.call(wire.Hold(0, 0, number), self._deadlines.call, epoch=epoch)
        if answer is None:
            certain = self._certain.get(lease, 0.0)
            return certain if certain >= asked + CERTAIN_SECONDS else 0.0
        self._note(lease, None)
        return math.inf if isinstance(answer[1], wire.Done) and answer[1].ok else 0.0

    def release(self, lease: int, shard: int | None = None) -> None:
        """Give a lease up; see `StoreClient.release`."""
        self._note(lease, None)
        epoch, number = split(lease)
        self._link.post(wire.Release(0, 0, number, -1 if shard is None else shard), epoch)

    def reserve(self, parent: bytes, position: int, hashes: Sequence[bytes]) -> list[int | None]:
        """Reserve slots for new blocks; see `StoreClient.reserve`."""
        (reservation,) = self.reserve_soon([Run(parent, position, hashes)])
        return reservation.take(wait=True) or [None] * len(hashes)

    def reserve_soon(self, runs: Sequence[Run]) -> list[Reservation]:
        """Ask for slots; see `StoreClient.reserve_soon`."""
        return self._reservations.ask(runs)

    def commit(self, tickets: Sequence[int], shard: int = 0) -> None:
        """Say that one shard's bytes are in place; see `StoreClient.commit`."""
        for epoch, numbers in tickets_by_epoch(tickets):
            self._link.post(wire.Commit(0, 0, numbers, shard), epoch)

    def abort(self, tickets: Sequence[int], shard: int | None = None) -> None:
        """Give reservations up; see `StoreClient.abort`."""
        for epoch, numbers in tickets_by_epoch(tickets):
            self._link.post(wire.Abort(0, 0, numbers, -1 if shard is None else shard), epoch)

    def slot_view(self, slot: int, shard: int = 0) -> memoryview:
        """Return one shard's bytes of a slot; see `StoreClient.slot_view`.

        Raises:
            ValueError: The slot was never handed out to this engine, or too long ago.
        """
        size = self.form.shard_bytes
        return self._mappings.view(slot, shard * size, size)

    def leave(self, key: int, data: bytes, readers: Sequence[int], tickets: Sequence[int]) -> bool:
        """Leave a note about reservations for other ranks of the same engine.

        Args:
            key: Its number, 0 to 2**63 - 1.
            data: What it says, up to 64 KiB.
            readers: The ranks that will fetch it.
            tickets: The reservations, of one epoch. A rank that does not get the note in time gives its part
                in them up.

        Returns:
            Whether the agent has it. If not, it may still arrive.
        """
        packed = tickets_by_epoch(tickets)
        if len(packed) != 1:
            return False
        ((epoch, numbers),) = packed
        request = wire.Leave(0, 0, key, data, list(readers), numbers)
        answer = self._link.call(request, self._deadlines.call, epoch=epoch)
        return answer is not None and isinstance(answer[1], wire.Done) and answer[1].ok

    def fetch(self, key: int) -> bytes:
        """Return the note that another client of the same engine left, once; b"" where there is none."""
        answer = self._link.call(wire.Fetch(0, 0, key), self._deadlines.call)
        return answer[1].data if answer is not None and isinstance(answer[1], wire.Note) else b""

    def stats(self) -> Mapping[str, int | float]:
        """Return what the agent's store counts, and this client's own counters: `client_*`."""
        answer = self._link.call(wire.Stats(0, 0), self._deadlines.call)
        values: dict[str, int | float] = {}
        if answer is not None and isinstance(answer[1], wire.Numbers):
            values.update(answer[1].values)
        values.update(self._counters.snapshot())
        values["client_connected"] = int(self.connected)
        values["client_arenas"] = len(self._mappings)
        return values

    def close(self, timeout: float = 10.0) -> None:
        """Have the agent write what is pending, up to `timeout` seconds, and leave; it keeps the blocks."""
        deadline = time.monotonic() + timeout
        self._link.call(wire.Flush(0, 0, timeout), timeout + self._deadlines.call)
        self._link.close(max(1.0, deadline - time.monotonic()))
        self._mappings.close()

    def _tend(self) -> None:
        self._mappings.drop_old()
        self._reservations.expire()

    def _note(self, lease: int, until: float | None) -> None:
        """Note until when a lease holds for certain, and forget those whose time has come."""
        now = self._clock()
        with self._certain_lock:
            self._certain.pop(lease, None)
            while self._certain:
                oldest, end = next(iter(self._certain.items()))
                if end > now:
                    break
                del self._certain[oldest]
            if until is not None:
                self._certain[lease] = until


def connect(
    config: Config,
    namespace: Namespace,
    layout: BlockLayout,
    *,
    group: str | None = None,
    rank: int = 0,
    ranks: int = 1,
    spawn: bool | None = None,
    prepare: Prepare | None = None,
    wait: float = CONNECT_SECONDS,
    deadlines: Deadlines | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> AgentClient:
    """Attach to the agent that `config` means.

    Args:
        config: The configuration; it says where the agent is and how long a lookup waits.
        namespace: What the blocks are blocks of.
        layout: How their bytes are arranged, all shards.
        group: Name of the engine, equal for all of its ranks and no other's; None: a name of its own.
        rank: Which of the engine's clients this is. Every process of the engine that reads or fills slots has
            one; leases are released with the rank as shard.
        ranks: How many clients the engine has. Nothing matches, and nothing is reserved, until all are there.
        spawn: Whether to start an agent when none runs; None: as the configuration says.
        prepare: Called with each new arena before its first use, in the client's thread, such as to pin it.
        wait: Seconds to wait for the agent. It may also come later.
        deadlines: How long calls wait; None for the usual.
        clock: Monotonic seconds, for leases.

    Returns:
        A client, connected or not. It connects, and connects again, by itself.
    """
    directory = agent_directory(config)
    form = slot_form(layout, config.memory.format)
    hello = wire.Attach(
        json.dumps(dict(namespace.facts)).encode(),
        namespace.id,
        asdict(layout),
        group if group is not None else secrets.token_hex(16),
        rank,
        ranks,
        form.name,
        form.slot_bytes,
        prepare is not None,
    )
    if spawn is None:
        spawn = config.agent.mode == "auto"
    counters = Counters()
    mappings = Mappings(prepare, LEASE_SECONDS, clock)
    dialler = Dialler(directory, hello, mappings, partial(launch, config, directory) if spawn else None)
    link = Link(dialler, rank, counters)
    client = AgentClient(
        namespace,
        layout,
        link,
        mappings,
        counters,
        form=form,
        lookup_wait=config.lookup_wait,
        deadlines=deadlines or Deadlines(),
        clock=clock,
    )
    client.wait_connected(wait)
    return client
