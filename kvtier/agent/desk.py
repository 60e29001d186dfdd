"""The desk: answers the requests of attached clients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kvtier._counters import Counters
from kvtier.agent import wire
from kvtier.agent.sessions import Session, Sessions
from kvtier.hashing import HASH_BYTES
from kvtier.store import Match, Run, TieredStore
from kvtier.store.tiered import Lookup

Answer = bytes | None | Callable[[], bytes]
_Later = Callable[[], wire.AnyReply]
_Handler = Callable[[Session, Any], "wire.AnyReply | _Later | None"]


class Desk:
    """Turns requests into calls of the session's store, and what they return into replies.

    Everything that a client sends is checked here, before a store sees it.

    Args:
        sessions: Who is attached.
        counters: Where to count.
    """

    def __init__(self, sessions: Sessions, counters: Counters) -> None:
        self._sessions = sessions
        self._counters = counters
        self._answers: dict[type, _Handler] = {
            wire.Ready: self._ready,
            wire.Ping: self._ping,
            wire.MatchBlocks: self._match,
            wire.Hold: self._hold,
            wire.Release: self._release,
            wire.Reserve: self._reserve,
            wire.Commit: self._commit,
            wire.Abort: self._abort,
            wire.Stats: self._stats,
            wire.Flush: self._flush,
            wire.Leave: self._leave,
            wire.Fetch: self._fetch,
        }

    def admit(self, data: bytes) -> tuple[Session, wire.AnyRequest]:
        """Decode a request and find who sent it.

        Raises:
            WireError: It is no request, or nobody who is attached sent it.
        """
        request = wire.decode_request(data)
        session = self._sessions.find(request.session)
        if session is None:
            raise wire.WireError("a request of an unknown session")
        return session, request

    def answer(self, session: Session, request: wire.AnyRequest) -> Answer:
        """Do what a request says.

        Returns:
            The encoded reply; None where there is none; or, where the answer may take longer than others
            should wait, what is to be called elsewhere to get it.

        Raises:
            WireError: A part of the request makes no sense.
        """
        reply = self._answers[type(request)](session, request)
        if reply is None or not request.id:
            return None
        if callable(reply):
            later = reply
            return lambda: wire.encode(later())
        return wire.encode(reply)

    def _ready(self, session: Session, request: wire.Ready) -> wire.Done:
        self._sessions.set_ready(session)
        return wire.Done(request.id, True)

    def _ping(self, session: Session, request: wire.Ping) -> wire.Done:
        return wire.Done(request.id, True)

    def _match(self, session: Session, request: wire.MatchBlocks) -> wire.AnyReply | _Later:
        hashes = wire.split_hashes(request.hashes)
        if not session.group.whole:
            return wire.Matched(request.id, 0, b"", {})
        wait, cost = wire.bounded_wait(request.wait), wire.bounded_wait(request.block_cost) or None
        further = wire.bounded_wait(request.ask_again)
        lookup = session.opened.store.look_up(hashes, wait + further, cost)
        if wait and lookup.origin:
            return lambda: self._matched(session, request, lookup, wait)
        return self._matched(session, request, lookup, 0.0)

    def _matched(
        self, session: Session, request: wire.MatchBlocks, lookup: Lookup, wait: float
    ) -> wire.Matched:
        cost, further = wire.bounded_wait(request.block_cost) or None, wire.bounded_wait(request.ask_again)
        store, group = session.opened.store, session.group
        # Every rank reads what is stored once for all (one shard), and a rank may stand for several shards.
        holders = max(group.ranks, store.layout.shards)
        match = store.finish(lookup, wait, cost, further, holders=holders, owner=group.owner)
        if match.lease and not group.members:
            # The engine went while this waited: nobody will release it.
            store.release(match.lease, owner=group.owner)
            match = Match()
        slots = wire.pack_numbers(match.slots, "I")
        return wire.Matched(request.id, match.lease, slots, dict(match.sources), match.ask_again)

    def _hold(self, session: Session, request: wire.Hold) -> wire.Done:
        held = session.opened.store.hold(request.lease, owner=session.group.owner)
        return wire.Done(request.id, held > 0.0)

    def _release(self, session: Session, request: wire.Release) -> None:
        shard = None if request.shard < 0 else request.shard
        session.opened.store.release(request.lease, shard, owner=session.group.owner)

    def _reserve(self, session: Session, request: wire.Reserve) -> wire.Reserved:
        runs = [
            Run(parent, position, wire.split_hashes(hashes))
            for parent, position, hashes in request.runs
            if hashes
        ]
        if any(len(run.parent) != HASH_BYTES or run.position < 0 for run in runs):
            raise wire.WireError("a reservation without a parent or position")
        blocks = sum(len(run.hashes) for run in runs)
        if blocks > wire.MAX_BLOCKS:
            raise wire.WireError("a reservation of too many blocks")
        store, group = session.opened.store, session.group
        if not group.whole:
            return wire.Reserved(request.id, wire.pack_numbers([wire.NO_TICKET] * blocks, "Q"))
        granted = store.reserve_runs(runs, owner=group.owner)
        numbers = [wire.NO_TICKET if ticket is None else ticket for tickets in granted for ticket in tickets]
        return wire.Reserved(request.id, wire.pack_numbers(numbers, "Q"))

    def _commit(self, session: Session, request: wire.Commit) -> None:
        store = session.opened.store
        tickets, shard = wire.unpack_numbers(request.tickets, "Q"), _checked(request.shard, store)
        store.commit(tickets, shard, owner=session.group.owner)

    def _abort(self, session: Session, request: wire.Abort) -> None:
        store = session.opened.store
        shard = None if request.shard == -1 else _checked(request.shard, store)
        store.abort(wire.unpack_numbers(request.tickets, "Q"), shard, owner=session.group.owner)

    def _stats(self, session: Session, request: wire.Stats) -> wire.Numbers:
        return wire.Numbers(request.id, dict(session.opened.store.stats()))

    def _flush(self, session: Session, request: wire.Flush) -> _Later:
        timeout = wire.bounded_wait(request.timeout)
        return lambda: wire.Done(request.id, session.opened.store.flush(timeout))

    def _leave(self, session: Session, request: wire.Leave) -> wire.Done:
        readers = {rank for rank in request.readers if 0 <= rank < session.group.ranks}
        tickets = wire.unpack_numbers(request.tickets, "Q")
        left = session.group.notes.leave(request.key, request.data, readers, tickets)
        return wire.Done(request.id, left)

    def _fetch(self, session: Session, request: wire.Fetch) -> wire.Note:
        data, tickets = session.group.notes.fetch(request.key, session.rank)
        return wire.Note(request.id, data, wire.pack_numbers(tickets, "Q"))


def _checked(shard: int, store: TieredStore) -> int:
    if not 0 <= shard < store.layout.shards:
        raise wire.WireError(f"shard {shard} of {store.layout.shards}")
    return shard
