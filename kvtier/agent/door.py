"""The door: lets clients of this user in, and hands them the arena."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.agent import wire
from kvtier.agent.sessions import Session, Sessions
from kvtier.agent.stores import Stores
from kvtier.codec import SlotForm
from kvtier.errors import KvTierError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout

_log = logging.getLogger(__name__)

GREETERS = 4
"""Clients that are let in at the same time; a store that is opened for one takes its time."""

HELLO_SECONDS = 5.0
"""Time that a client has to say what it wants."""

_BACKLOG = 64
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
        self._greeters = Workers("greet", GREETERS)

    def fileno(self) -> int:
        """Return the descriptor to poll for clients that come."""
        return self._socket.fileno()

    def accept(self) -> None:
        """Take one client in, if there is one, and have it greeted."""
        try:
            connection, _ = self._socket.accept()
        except OSError:
            # It left already, or this process is out of descriptors for now.
            self._counters.add("failed_accepts")
            return
        self._greeters.run(lambda: self._greet(connection))

    def close(self) -> None:
        """Stop listening; who has been let in stays."""
        self._socket.close()
        self._path.unlink(missing_ok=True)
        self._greeters.close()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(HELLO_SECONDS)
            payload = receive_frame(connection)
            check_peer(connection)
            attach = wire.decode_attach(payload)
            session = self._attach(connection, attach)
        except (wire.WireError, KvTierError, OSError) as error:
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
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise ConnectionResetError("the other side closed the connection")
        data += part
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
    if namespace.id != attach.namespace:
        raise wire.WireError("the namespace's id does not follow from its facts: other versions of kvtier?")
    return namespace, layout
