"""Who is attached to the agent, and as whose part."""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
from dataclasses import dataclass, field
from functools import partial

from kvtier.agent import wire
from kvtier.agent.notes import Notes
from kvtier.agent.stores import OpenStore, Stores
from kvtier.errors import ConfigError

DEATH_SECONDS = 10.0
"""A killed process's connection ends at once; what a GPU copies for it, when the driver takes that apart."""


@dataclass(eq=False, slots=True)
class Group:
    """The clients of one engine: one for each of its ranks.

    Attributes:
        owner: The number that the store knows the engine's leases and reservations by.
        ranks: How many clients it has when it is whole.
        notes: What its clients have left for each other.
        members: Those that are attached.
        whole: Whether all ranks are attached and ready. Nothing is promised to an engine that is not: every
            rank has to be able to read, and to fill, each slot.
        pins: Whether one of them had the arena pinned.
    """

    owner: int
    ranks: int
    notes: Notes
    members: set[Session] = field(default_factory=set)
    whole: bool = False
    pins: bool = False


@dataclass(eq=False, slots=True)
class Session:
    """One client.

    Attributes:
        token: What its requests name.
        opened: The store that it is attached to.
        group: Its engine.
        rank: Its place there.
        connection: Its connection to the door, which ends when its process does.
        ready: Whether it has mapped the arena.
    """

    token: int
    opened: OpenStore
    group: Group
    rank: int
    connection: socket.socket
    ready: bool = False


class Sessions:
    """The table of clients. An engine's leases and reservations end when the last client of it is gone.

    Not before: as long as one of its processes lives, a copy from or to one of its slots may be under way.
    And if a GPU copies, the slots that it may be writing to stay taken for `DEATH_SECONDS` more.
    """

    def __init__(self, stores: Stores) -> None:
        self._stores = stores
        self._lock = threading.Lock()
        self._by_token: dict[int, Session] = {}
        self._groups: dict[tuple[int, str], Group] = {}
        self._owners = itertools.count(1)

    def __len__(self) -> int:
        return len(self._by_token)

    def find(self, token: int) -> Session | None:
        """Return the client that has this token."""
        return self._by_token.get(token)

    def add(self, opened: OpenStore, connection: socket.socket, attach: wire.Attach) -> Session:
        """Enter a client, which counts as a user of the store already.

        Raises:
            ConfigError: The engine's clients are not of one mind about their number.
        """
        rank, ranks = attach.rank, attach.ranks
        with self._lock:
            key = (opened.epoch, attach.group)
            known = self._groups.get(key)
            if known is None:
                owner = next(self._owners)
                give_up = partial(opened.store.abort, owner=owner)
                known = Group(owner, ranks, Notes(give_up, self._stores.clock))
            if known.ranks != ranks or not 0 <= rank < ranks:
                raise ConfigError(f"rank {rank} of {ranks} joins an engine of {known.ranks} ranks")
            self._groups[key] = known
            session = Session(secrets.randbits(64), opened, known, rank, connection)
            known.members.add(session)
            known.pins |= attach.pins
            self._by_token[session.token] = session
        return session

    def set_ready(self, session: Session) -> None:
        """Note that a client has mapped the arena."""
        with self._lock:
            session.ready = True
            self._recount(session.group)

    def remove(self, session: Session) -> None:
        """Let a client go whose connection has ended; a second call does nothing."""
        with self._lock:
            if self._by_token.pop(session.token, None) is None:
                return
            group = session.group
            group.members.discard(session)
            self._recount(group)
            if not group.members:
                self._groups = {key: other for key, other in self._groups.items() if other is not group}
        if not group.members:
            session.opened.store.drop_owner(group.owner, DEATH_SECONDS if group.pins else 0.0)
        self._stores.leave(session.opened)
        session.connection.close()

    def tend(self) -> None:
        """Drop what nobody is going to fetch."""
        for group in list(self._groups.values()):
            group.notes.expire()

    def remove_all(self) -> None:
        """Let all clients go: the agent has ended."""
        for session in list(self._by_token.values()):
            self.remove(session)

    def _recount(self, group: Group) -> None:
        ready = {member.rank for member in group.members if member.ready}
        group.whole = len(ready) == group.ranks
