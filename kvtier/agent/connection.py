"""One attachment of a client to an agent: how it comes about, and messages over it."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from enum import Enum
from pathlib import Path

import zmq

from kvtier._logging import log_once
from kvtier.agent import wire
from kvtier.agent.door import check_peer, receive_frame
from kvtier.agent.forks import close_in_children
from kvtier.agent.mapping import Mappings
from kvtier.agent.place import check_directory

_log = logging.getLogger(__name__)

ATTACH_SECONDS = 60.0
"""An agent that opens a store for the first time may have to read an index first."""


class Wait(Enum):
    """What a wait for the agent ended with."""

    READY = "ready"
    LATE = "late"
    GONE = "gone"


class Connection:
    """An attachment. It ends when the agent's process does, or with `close`.

    Methods other than `close` are for one thread at a time.

    Attributes:
        epoch: What slots, tickets and leases that come over it are of.
        session: What requests over it have to name.
        door: Readable when the agent is gone.
    """

    def __init__(self, door: socket.socket, desk: zmq.Socket[bytes], attached: wire.Attached) -> None:
        self.epoch = attached.epoch
        self.session = attached.session
        self.door = door
        close_in_children(door)
        self._desk = desk
        self._readable, self._writable = zmq.Poller(), zmq.Poller()
        self._readable.register(desk, zmq.POLLIN)
        self._writable.register(desk, zmq.POLLOUT)
        for poller in (self._readable, self._writable):
            poller.register(door.fileno(), zmq.POLLIN)

    def send(self, request: wire.AnyRequest) -> bool:
        """Send a request; False when the agent takes no more at present. Never waits."""
        request.session = self.session
        try:
            self._desk.send(wire.encode(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self) -> wire.AnyReply | None:
        """Return the next reply that is here already, if there is one."""
        while True:
            try:
                return wire.decode_reply(self._desk.recv(zmq.NOBLOCK))
            except zmq.Again:
                return None
            except wire.WireError as error:
                log_once(_log, "reply", "a reply of the agent was dropped: %s", error)

    def wait(self, deadline: float, *, to_send: bool = False) -> Wait:
        """Wait until there is something to receive (or a request can be sent), or for the deadline.

        Args:
            deadline: On `time.monotonic`'s clock.
            to_send: Wait for room for a request.
        """
        remaining = max(0.0, deadline - time.monotonic())
        events = dict((self._writable if to_send else self._readable).poll(math.ceil(remaining * 1000)))
        if self._desk in events:
            return Wait.READY
        return Wait.GONE if self.door.fileno() in events else Wait.LATE

    def close(self) -> None:
        """Leave the agent."""
        self.door.close()
        self._desk.close()


def attach(
    directory: Path,
    hello: wire.Attach,
    mappings: Mappings,
    context: zmq.Context[zmq.Socket[bytes]],
    door: socket.socket,
) -> Connection:
    """Attach to the agent in `directory`, and map its arena.

    Args:
        directory: Where its sockets are.
        hello: What to attach to.
        mappings: Where the arena goes.
        context: Of the ZeroMQ socket.
        door: A fresh Unix socket, which this takes over. Another thread may shut it down to end the attempt.

    Raises:
        FileNotFoundError: No agent runs there.
        ConnectionRefusedError: No agent runs there any more.
        VersionMismatch: It speaks another version of the protocol.
        WireError: It refuses, or makes no sense.
        ConfigError: The directory is not to be trusted.
        OSError: It does not answer, or its arena cannot be mapped.
        ValueError: Its arena is shorter than it says.
    """
    try:
        check_directory(directory)
        door.settimeout(ATTACH_SECONDS)
        door.connect(str(directory / wire.DOOR))
        check_peer(door)
        door.sendall(wire.frame(hello))
        attached = _enter(door, mappings)
        return _open_desk(directory, door, attached, context)
    except BaseException:
        door.close()
        raise


def _enter(door: socket.socket, mappings: Mappings) -> wire.Attached:
    """Receive the answer and map the arena that comes with it."""
    header, fds, _, _ = socket.recv_fds(door, wire.FRAME_HEADER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        answer = wire.decode_answer(receive_frame(door, header))
        if isinstance(answer, wire.Refused):
            raise wire.WireError(f"it refuses: {answer.reason}")
        if not fds:
            raise wire.WireError("it sent no arena")
        fd = fds.pop()
    finally:
        for left in fds:
            os.close(left)
    mappings.enter(answer.epoch, answer.arena, fd, answer.arena_bytes)
    return answer


def _open_desk(
    directory: Path, door: socket.socket, attached: wire.Attached, context: zmq.Context[zmq.Socket[bytes]]
) -> Connection:
    desk = context.socket(zmq.DEALER)
    try:
        desk.setsockopt(zmq.LINGER, 0)
        desk.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        # What is queued for an agent that died must not reach the next one.
        desk.setsockopt(zmq.RECONNECT_IVL, -1)
        desk.connect(f"ipc://{directory / wire.DESK}")
        connection = Connection(door, desk, attached)
        connection.send(wire.Ready(0, 1))
        if connection.wait(time.monotonic() + ATTACH_SECONDS) is not Wait.READY or not connection.receive():
            raise TimeoutError("it let this client in and then said nothing")
        return connection
    except BaseException:
        desk.close()
        raise
