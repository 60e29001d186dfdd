"""The agent: one loop that lets clients in, answers them, and notices when they die."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zmq

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier._workers import Workers
from kvtier.agent import wire
from kvtier.agent.desk import Desk
from kvtier.agent.door import Door
from kvtier.agent.place import identity, remove_own
from kvtier.agent.sessions import Session, Sessions
from kvtier.agent.stores import Stores

_log = logging.getLogger(__name__)

WAITERS = 16
"""Lookups and flushes that may wait at the same time; a client has one at a time. Others do not wait."""

TICK_SECONDS = 0.25
"""Time between two looks at what no message announces."""

_MESSAGES_A_ROUND = 256
_SEND_QUEUE = 1000
_RECEIVE_QUEUE = 64


class Agent:
    """Serves the stores to clients, in one thread.

    Attributes:
        directory: Where the sockets lie.
        stores: What is served.
        sessions: Who is attached.
        counters: What happened at the sockets.
        beat: When the loop last came round, monotonic seconds.
    """

    def __init__(self, directory: Path, stores: Stores, *, linger: float | None = None) -> None:
        """Bind the sockets. Whoever calls holds the directory's lock.

        Args:
            directory: Where the sockets are to lie; what a dead agent left there is replaced.
            stores: What to serve; the agent closes them.
            linger: Seconds without any client after which `run` ends by itself; None: never.

        Raises:
            OSError: A socket cannot be bound.
        """
        self.directory = directory
        self.stores = stores
        self.sessions = Sessions(stores)
        self.counters = Counters()
        self.beat = time.monotonic()
        self._linger = linger
        self._desk = Desk(self.sessions, self.counters)
        self._context = zmq.Context(io_threads=1)
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        self._router.setsockopt(zmq.RCVHWM, _RECEIVE_QUEUE)
        (directory / wire.DESK).unlink(missing_ok=True)
        try:
            self._router.bind(f"ipc://{directory / wire.DESK}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, error.strerror) from error
        self._file = identity(directory / wire.DESK)
        self._arrivals: queue.SimpleQueue[Session] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()
        self._wake, self._bell = socket.socketpair()
        self._wake.setblocking(False)
        self._bell.setblocking(False)
        self._connections: dict[int, Session] = {}
        self._waiters = Workers("wait", WAITERS)
        self._waiting = 0
        # No `Event`: a signal may come while its lock is held, and the handler would wait for itself.
        self._stopping = False
        # Last: from here on clients come in.
        path = directory / wire.DOOR
        self._door = Door(path, stores, self.sessions, self._arrive, self.counters, self._leave)

    @property
    def stopping(self) -> bool:
        """Whether the agent takes no more clients."""
        return self._stopping

    def stop(self) -> None:
        """Make `run` return soon; may be called from any thread and from a signal handler."""
        self._stopping = True
        self._rouse()

    def run(self, flush_timeout: float) -> None:
        """Serve until `stop`; then flush the stores for up to `flush_timeout` seconds and free everything.

        While it flushes, lookups are misses and nothing new is reserved, but commits are taken.
        """
        self._serve(lambda: self._stopping)
        self._door.close()
        flushed = threading.Event()

        def flush() -> None:
            self.stores.close(flush_timeout)
            flushed.set()
            self._rouse()

        threading.Thread(target=flush, name="kvtier-flush", daemon=True).start()
        self._serve(flushed.is_set)
        self._close()

    def stats(self) -> dict[str, int | float]:
        """Return counters and gauges of the agent itself."""
        return {**self.counters.snapshot(), **self.stores.stats(), "clients": len(self.sessions)}

    def _leave(self) -> bool:
        """End early if an engine started this agent, and nobody uses it: there is to be another."""
        if self._linger is None or len(self.sessions):
            return False
        _log.info("somebody needs another agent, and nobody this one")
        self.stop()
        return True

    def _serve(self, ended: Callable[[], bool]) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        for fd in self._connections:
            poller.register(fd, zmq.POLLIN)
        listening = not self._stopping
        deaf = False
        if listening:
            poller.register(self._door.fileno(), zmq.POLLIN)
        next_tick = alone_since = time.monotonic()
        while not ended():
            events = dict(poller.poll(int(TICK_SECONDS * 1000)))
            self.beat = now = time.monotonic()
            if self._wake.fileno() in events:
                self._woken(poller)
            if self._router in events:
                self._answer_some()
            if listening and self._door.fileno() in events and not self._door.accept():
                poller.unregister(self._door.fileno())
                deaf = True
            for fd in events.keys() & self._connections.keys():
                self._listen(fd, poller)
            if now >= next_tick:
                next_tick = now + TICK_SECONDS
                self.stores.tend()
                self.sessions.tend()
                if deaf:
                    poller.register(self._door.fileno(), zmq.POLLIN)
                    deaf = False
            if len(self.sessions):
                alone_since = now
            elif self._linger is not None and now - alone_since >= self._linger:
                self._stopping = True

    def _answer_some(self) -> None:
        for _ in range(_MESSAGES_A_ROUND):
            try:
                parts = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._answer(parts)
            except wire.WireError as error:
                self.counters.add("bad_messages")
                log_once(_log, "message", "a message was dropped: %s", error)
            except Exception as error:  # noqa: BLE001 - one client's request must not end the service of all
                self.counters.add("failed_requests")
                log_once(_log, "request", "a request failed: %r", error)

    def _answer(self, parts: list[bytes]) -> None:
        if len(parts) != 2:
            raise wire.WireError(f"a message of {len(parts)} parts")
        identity, data = parts
        session, request = self._desk.admit(data)
        if self._waiting >= WAITERS:
            if isinstance(request, wire.MatchBlocks):
                request.wait = 0.0
            elif isinstance(request, wire.Flush):
                self._reply(identity, wire.encode(wire.Done(request.id, False)))
                return
        try:
            answer = self._desk.answer(session, request)
        except Exception:
            # The client must not take this for a hang.
            if request.id:
                self._reply(identity, wire.encode(wire.Done(request.id, False)))
            raise
        if callable(answer):
            self._waiting += 1
            self._waiters.run(lambda: self._wait(identity, request.id, answer))
        elif answer is not None:
            self._reply(identity, answer)

    def _wait(self, identity: bytes, number: int, answer: Callable[[], bytes]) -> None:
        reply = wire.encode(wire.Done(number, False))
        try:
            reply = answer()
        finally:
            self._replies.put((identity, reply))
            self._rouse()

    def _reply(self, identity: bytes, reply: bytes) -> None:
        try:
            self._router.send_multipart((identity, reply), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.counters.add("lost_replies")
            log_once(_log, "reply", "a reply could not be sent: %s", error)

    def _arrive(self, session: Session) -> None:
        self._arrivals.put(session)
        self._rouse()

    def _woken(self, poller: zmq.Poller) -> None:
        self._wake.recv(4096)
        while not self._replies.empty():
            identity, reply = self._replies.get()
            self._waiting -= 1
            self._reply(identity, reply)
        while not self._arrivals.empty():
            session = self._arrivals.get()
            session.connection.setblocking(False)
            fd = session.connection.fileno()
            self._connections[fd] = session
            poller.register(fd, zmq.POLLIN)

    def _listen(self, fd: int, poller: zmq.Poller) -> None:
        session = self._connections[fd]
        try:
            if session.connection.recv(4096, socket.MSG_DONTWAIT):
                # Clients have nothing to say here; only the end of the connection means something.
                self.counters.add("bad_messages")
                return
        except BlockingIOError:
            return
        except OSError as error:
            _log.info("a client's connection failed: %s", error)
        poller.unregister(fd)
        del self._connections[fd]
        self.sessions.remove(session)

    def _rouse(self) -> None:
        # It fails when the loop has been roused often enough already, or has ended.
        with suppress(OSError):
            self._bell.send(b"!")

    def _close(self) -> None:
        remove_own(self.directory / wire.DESK, self._file)
        self._waiters.close()
        self._router.close()
        self._context.term()
        self.sessions.remove_all()
        self.stores.memory.close()
        self._wake.close()
        self._bell.close()
