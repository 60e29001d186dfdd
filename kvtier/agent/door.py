"""The door: lets clients of this user in, and hands them the arena."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.agent import wire
from kvtier.agent.place import identity, remove_own
from kvtier.agent.sessions import Session, Sessions
from kvtier.agent.stores import Stores
from kvtier.codec import SlotForm
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout

_log = logging.getLogger(__name__)

GREETERS = 16
"""Clients that are let in at the same time; a store that is opened for the ranks of one takes its time."""

HELLO_SECONDS = 5.0
"""Time that a client has to say what it wants."""

_BACKLOG = 64
_LEAST_SECONDS = 0.001
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_CREDENTIALS = struct.Struct("3i")


class Door:
    """A listening Unix socket and the threads that greet who comes.

    Args:
        path: Of the socket; a file that a dead agent left there is replaced.
        stores: What clients want to use.
        sessions: Where they are entered.
        arrived: Called, from a greeter's thread, with each client that has been let in.
        counters: Where to count.
        make_room: Called when somebody came who cannot use an agent of this version; says whether it ends.
    """

    def __init__(
        self,
        path: Path,
        stores: Stores,
        sessions: Sessions,
        arrived: Callable[[Session], None],
        counters: Counters,
        make_room: Callable[[], bool],
    ) -> None:
        self._stores = stores
        self._sessions = sessions
        self._arrived = arrived
        self._counters = counters
        self._make_room = make_room
        # These hear from the kernel that the agent has ended.
        self._waiting: list[socket.socket] = []
        self._path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        self._socket.listen(_BACKLOG)
        self._file = identity(path)
        self._greeters = Workers("greet", GREETERS)

    def fileno(self) -> int:
        """Return the descriptor to poll for clients that come."""
        return self._socket.fileno()

    def accept(self) -> bool:
        """Take one client in, if there is one, and have it greeted; False if none can be for the moment."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            self._counters.add("failed_accepts")
            return error.errno not in _EXHAUSTED
        self._greeters.run(lambda: self._greet(connection))
        return True

    def close(self) -> None:
        """Stop listening; who has been let in stays."""
        # While the socket is open, nobody else's file can look like it.
        remove_own(self._path, self._file)
        self._socket.close()
        self._greeters.close()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HELLO_SECONDS)
            payload = receive_frame(connection)
            check_peer(connection)
            attach = wire.decode_attach(payload)
            session = self._attach(connection, attach)
        except Exception as error:  # noqa: BLE001 - whatever it sent, it is told, and others are served
            self._counters.add("refused_clients")
            log_once(_log, type(error).__name__, "a client was refused: %s", error)
            if isinstance(error, wire.VersionMismatch) and self._make_room():
                self._waiting.append(connection.dup())
            refuse(connection, str(error))
            return
        self._arrived(session)

    def _attach(self, connection: socket.socket, attach: wire.Attach) -> Session:
        namespace, layout = _identify(attach)
        opened = self._stores.join(namespace, layout)
        try:
            _check_form(opened.store.form, attach)
            session = self._sessions.add(opened, connection, attach)
        except BaseException:
            self._stores.leave(opened)
            raise
        memory = self._stores.memory
        answer = wire.Attached(session.token, opened.epoch, self._stores.arena, memory.length)
        try:
            socket.send_fds(connection, [wire.frame(answer)], [memory.fd])
        except BaseException:
            self._sessions.remove(session)
            raise
        return session


def check_peer(connection: socket.socket) -> None:
    """See that the process at the other end of a Unix socket runs as this user.

    Raises:
        WireError: It does not.
        OSError: The kernel does not say.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.geteuid():
        raise wire.WireError(f"the other side runs as user {uid}, this one as {os.geteuid()}")


def receive_frame(connection: socket.socket, start: bytes = b"") -> bytes:
    """Receive one frame, of whose header the bytes `start` are here already, and return its payload.

    Header and payload have the connection's timeout each, however small the pieces that they come in.

    Raises:
        WireError: What came is none.
        OSError: The connection ended or timed out.
    """
    rest = _receive(connection, wire.FRAME_HEADER_BYTES - len(start))
    length = wire.frame_length(start + rest)
    return _receive(connection, length)


def refuse(connection: socket.socket, reason: str) -> None:
    """Tell the other side why it is not let in, as far as it listens, and close."""
    try:
        connection.sendall(wire.frame(wire.Refused(reason)))
    except OSError:
        log_once(_log, "refuse", "a refused client did not wait for the reason")
    connection.close()


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    timeout = connection.gettimeout()
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while len(data) < length:
        if timeout is not None:
            connection.settimeout(max(deadline - time.monotonic(), _LEAST_SECONDS))
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionResetError("the other side closed the connection")
        data += part
        if time.monotonic() > deadline:
            raise TimeoutError("the other side sends too slowly")
    connection.settimeout(timeout)
    return bytes(data)


def _check_form(form: SlotForm, attach: wire.Attach) -> None:
    asked, found = (attach.slot_format, attach.slot_bytes), (form.name, form.slot_bytes)
    if asked != found:
        raise wire.WireError(
            f"slots here are {found[0]}, {found[1]} bytes; the client expects {asked[0]}, {asked[1]} bytes:"
            " memory.format differs, or what is known of the model"
        )


def _identify(attach: wire.Attach) -> tuple[Namespace, BlockLayout]:
    try:
        facts = json.loads(attach.facts)
        facts.pop("format_version", None)
        namespace = Namespace.from_facts(facts)
        layout = BlockLayout(**attach.layout)  # type: ignore[arg-type]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise wire.WireError(f"no namespace and layout: {error}") from error
    if max(attach.ranks, layout.shards) > wire.MAX_RANKS:
        raise wire.WireError(f"{attach.ranks} ranks and {layout.shards} shards, of {wire.MAX_RANKS} at most")
    if namespace.id != attach.namespace:
        raise wire.WireError("the namespace's id does not follow from its facts: other versions of kvtier?")
    return namespace, layout
