"""A client's connection to the agent, and the thread that keeps it."""

from __future__ import annotations

import itertools
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.agent import wire
from kvtier.agent.connection import Connection, Wait
from kvtier.agent.dialler import Dialler

_log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 1.0
"""Pauses between attempts to connect double from the first to the last of these."""

POST_SECONDS = 0.01
"""What nobody waits for is sent, and its replies are received, by then, if no call does it before."""

_PROBE_SECONDS = 0.1


class State(Enum):
    """What a client thinks of its agent."""

    DOWN = "down"
    UP = "up"
    SUSPECT = "suspect"
    CLOSED = "closed"


@dataclass(eq=False, slots=True)
class Answer:
    """What a request will be answered with that nobody waits for.

    Attributes:
        epoch: What the reply is about.
        reply: The reply, once it is here.
        unwanted: Whether it is to be undone when it comes.
    """

    epoch: int
    reply: wire.AnyReply | None = None
    unwanted: bool = False


class Link:
    """Sends requests to the agent and waits for replies, never longer than a deadline.

    Callers' threads use the socket themselves, one at a time. A deadline that passes makes the agent suspect:
    from then on calls fail at once, without a look at the socket, until the link's own thread has got an
    answer to a ping; or, when the agent's process is gone, has attached to the next one.

    Requests that nobody waits for stand in a queue until a call is made, or the link's own thread comes
    round: a message wakes other threads, which costs its sender more than all the rest.

    A reply that comes too late is undone: the lease that it grants is released, its tickets are aborted.

    Args:
        dialler: Finds the agent; the link closes it.
        rank: The client's place in its engine.
        counters: Where to count.

    Attributes:
        tend: Called by the link's own thread, many times a second.
    """

    def __init__(self, dialler: Dialler, rank: int, counters: Counters) -> None:
        self._dialler = dialler
        self._rank = rank
        self._counters = counters
        self.tend: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._state = State.DOWN
        self._changed = threading.Condition()
        self._posts: deque[tuple[int, wire.AnyRequest]] = deque()
        # What was asked without waiting, by the request's id.
        self._asked: dict[int, Answer] = {}
        self._ids = itertools.count(1)
        self._ping = 0
        self._wake, self._bell = socket.socketpair()
        self._wake.setblocking(False)
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._keep, name="kvtier-agent-link", daemon=True)
        self._thread.start()

    @property
    def state(self) -> State:
        """What the client thinks of the agent."""
        return self._state

    @property
    def epoch(self) -> int:
        """The epoch that the client is attached to; 0 when it is not."""
        connection = self._connection
        return connection.epoch if connection is not None else 0

    def wait_up(self, timeout: float) -> bool:
        """Wait until the agent can be used, or `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._state is State.UP, timeout)

    def call(
        self, request: wire.AnyRequest, patience: float, epoch: int | None = None
    ) -> tuple[int, wire.AnyReply] | None:
        """Send a request and wait for its reply.

        Args:
            request: Its session and id are set here.
            patience: Seconds to wait at most, all in all.
            epoch: The epoch that the request is about; None: whichever is present.

        Returns:
            The epoch that the reply is about, and the reply; None when the agent cannot be used, does not
            answer in time, or is of another epoch.
        """
        if self._state is not State.UP:
            return None
        deadline = time.monotonic() + patience
        if not self._lock.acquire(timeout=patience):
            return None
        try:
            connection = self._connection
            if self._state is not State.UP or connection is None or epoch not in (None, connection.epoch):
                return None
            reply = self._exchange(connection, request, deadline)
            return None if reply is None else (connection.epoch, reply)
        finally:
            self._lock.release()
            self._send_on()

    def ask(self, request: wire.AnyRequest) -> Answer | None:
        """Send a request soon, and do not wait for the reply.

        Returns:
            Where the reply is going to be, None when the agent cannot be used.
        """
        connection = self._connection
        if self._state is not State.UP or connection is None:
            return None
        request.id = next(self._ids)
        answer = self._asked[request.id] = Answer(connection.epoch)
        self._posts.append((connection.epoch, request))
        return answer

    def wait_for(self, answer: Answer, patience: float) -> wire.AnyReply | None:
        """Return the reply to what was asked, None if it does not come in time.

        Args:
            answer: From `ask`.
            patience: Seconds to wait at most.
        """
        if answer.reply is not None or self._state is not State.UP:
            return answer.reply
        deadline = time.monotonic() + patience
        if not self._lock.acquire(timeout=patience):
            return answer.reply
        try:
            connection = self._connection
            while connection is not None and connection.epoch == answer.epoch and answer.reply is None:
                sent = self._send_posts(connection)
                reply = connection.receive()
                if reply is not None:
                    self._file(connection, reply)
                elif not self._wait(connection, deadline, to_send=not sent):
                    break
        finally:
            self._lock.release()
            self._send_on()
        return answer.reply

    def renounce(self, answer: Answer) -> wire.AnyReply | None:
        """Return the reply to what was asked if it is here; if it comes later, it is undone."""
        with self._lock:
            answer.unwanted = True
            return answer.reply

    def post(self, request: wire.AnyRequest, epoch: int) -> None:
        """Send a request that wants no reply, soon. Never waits."""
        # Also when this thinks that the agent is gone: the agent lets a client in before the client knows it,
        # and the engine's leader may have been promised something already that this rank has to give back.
        if self._state is not State.CLOSED:
            self._posts.append((epoch, request))

    def close(self, timeout: float) -> None:
        """End the connection and the thread, waiting up to `timeout` seconds for it."""
        self._set_state(State.CLOSED)
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.close()
        self._dialler.stop()
        self._ring()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._dialler.close()
            self._wake.close()
            self._bell.close()

    def _exchange(
        self, connection: Connection, request: wire.AnyRequest, deadline: float
    ) -> wire.AnyReply | None:
        """Send, and receive until the reply comes; the lock is held."""
        request.id = next(self._ids)
        while not (self._send_posts(connection) and connection.send(request)):
            if not self._wait(connection, deadline, to_send=True):
                return None
        while True:
            reply = connection.receive()
            if reply is None:
                if not self._wait(connection, deadline):
                    return None
            elif reply.id == request.id:
                return reply
            else:
                self._file(connection, reply)

    def _wait(self, connection: Connection, deadline: float, *, to_send: bool = False) -> bool:
        """Wait for the agent; False when time is up or it is gone. The lock is held."""
        ended = connection.wait(deadline, to_send=to_send)
        if ended is Wait.GONE:
            self._lose(connection)
        elif ended is Wait.LATE:
            self._suspect()
        return ended is Wait.READY

    def _file(self, connection: Connection, reply: wire.AnyReply) -> None:
        """Put a reply where it is looked for, or undo it; the lock is held."""
        answer = self._asked.pop(reply.id, None)
        if answer is None or answer.unwanted:
            self._undo(connection, reply)
        else:
            answer.reply = reply

    def _undo(self, connection: Connection, reply: wire.AnyReply) -> None:
        """Give back what a reply grants that nobody waits for any more; the lock is held."""
        if isinstance(reply, wire.Matched) and reply.lease:
            self._posts.append((connection.epoch, wire.Release(0, 0, reply.lease, -1)))
        elif isinstance(reply, wire.Reserved):
            numbers = wire.unpack_numbers(reply.tickets, "Q")
            tickets = [number for number in numbers if number != wire.NO_TICKET]
            self._posts.append((connection.epoch, wire.Abort(0, 0, wire.pack_numbers(tickets, "Q"), -1)))
        elif isinstance(reply, wire.Note) and reply.tickets:
            self._posts.append((connection.epoch, wire.Abort(0, 0, reply.tickets, self._rank)))
        self._counters.add("client_late_replies")

    def _send_on(self) -> None:
        """Send what is queued, unless another thread has the socket: it will, when it is done."""
        while self._posts and self._lock.acquire(blocking=False):
            try:
                connection = self._connection
                if connection is None or not self._send_posts(connection):
                    return
            finally:
                self._lock.release()

    def _send_posts(self, connection: Connection) -> bool:
        """Send what is queued; False when the socket takes no more. The lock is held."""
        while self._posts:
            epoch, request = self._posts.popleft()
            if epoch != connection.epoch:
                continue
            if not connection.send(request):
                self._posts.appendleft((epoch, request))
                return False
        return True

    def _suspect(self) -> None:
        self._counters.add("client_timeouts")
        log_once(_log, "suspect", "the agent did not answer in time: everything is a miss until it does")
        self._ping = 0
        self._set_state(State.SUSPECT)
        self._ring()

    def _lose(self, connection: Connection) -> None:
        """Note that the agent's process has ended; the lock is held."""
        self._counters.add("client_disconnects")
        log_once(_log, "lost", "the agent is gone: everything is a miss until there is one again")
        self._connection = None
        self._posts.clear()
        self._asked.clear()
        connection.close()
        self._set_state(State.DOWN)
        self._ring()

    def _set_state(self, state: State) -> None:
        with self._changed:
            if self._state is not State.CLOSED:
                self._state = state
            self._changed.notify_all()

    def _ring(self) -> None:
        try:
            self._bell.send(b"!")
        except OSError:
            # Rung often enough already, or closed.
            return

    def _keep(self) -> None:
        """Attach, watch, probe: what the link's own thread does."""
        pause = FIRST_RETRY_SECONDS
        while self._state is not State.CLOSED:
            try:
                if self._state is State.UP:
                    pause = FIRST_RETRY_SECONDS
                    self._watch(POST_SECONDS)
                elif self._state is State.SUSPECT:
                    self._probe()
                elif not self._attach():
                    self._rest(pause)
                    pause = min(2 * pause, LAST_RETRY_SECONDS)
            except Exception as error:  # noqa: BLE001 - the engine has no other way back to its agent
                self._counters.add("client_link_defects")
                log_once(_log, "keep", "keeping the connection to the agent failed: %r", error)
                self._rest(LAST_RETRY_SECONDS)

    def _watch(self, seconds: float) -> None:
        """Wait for the agent's end or a ring of the bell, then see to what came late."""
        connection = self._connection
        if connection is None:
            return
        ended = self._rest(seconds, connection.door)
        with self._lock:
            if self._connection is not connection:
                return
            while (reply := connection.receive()) is not None:
                self._file(connection, reply)
            if ended:
                self._lose(connection)
        self._send_on()

    def _probe(self) -> None:
        """See whether an agent that is suspect answers a ping."""
        with self._lock:
            connection = self._connection
            if connection is None:
                return
            if not self._ping:
                ping = wire.Ping(0, next(self._ids))
                if self._send_posts(connection) and connection.send(ping):
                    self._ping = ping.id
            ended = connection.wait(time.monotonic() + _PROBE_SECONDS)
            while (reply := connection.receive()) is not None:
                if reply.id == self._ping:
                    _log.warning("the agent answers again")
                    self._set_state(State.UP)
                else:
                    self._file(connection, reply)
            if ended is Wait.GONE:
                self._lose(connection)
        self._send_on()

    def _rest(self, seconds: float, door: socket.socket | None = None) -> bool:
        """Wait for a ring of the bell, or (True) the end of a connection, or some seconds."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if door is not None and door.fileno() >= 0:
            poll.register(door, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(seconds * 1000)}
        rung = self._wake.fileno()
        if rung in ready:
            self._wake.recv(4096)
        self.tend()
        return bool(ready - {rung})

    def _attach(self) -> bool:
        """Try once to attach to the agent."""
        connection = self._dialler.attach()
        if connection is None:
            return False
        with self._lock:
            if self._state is State.CLOSED:
                connection.close()
                return True
            self._connection = connection
            self._counters.add("client_connects")
            self._set_state(State.UP)
        return True
