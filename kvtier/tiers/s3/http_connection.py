"""One keep-alive connection: requests go out, replies come back, bodies land where they belong."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from kvtier.errors import TierUnavailable
from kvtier.tiers.s3.bucket import BadReply, BucketTimeout, ConnectionLost
from kvtier.tiers.s3.http_wire import MAX_HEAD_BYTES, ReplyHead, parse_head
from kvtier.tiers.s3.waiting import wait_for

_BUFFER_BYTES = 8 << 10
"""Room for a reply's head; the beginning of the body that comes with it is copied, the rest is not."""
_MAX_LINE_BYTES = 4 << 10
_PIECE_BYTES = 1 << 20
_FAIR_BYTES = 4 << 20
_WAKE_BYTES = 256 << 10
_MAX_INTERIM_REPLIES = 8
_MAX_TRAILERS = 32


class Stalled(TierUnavailable):
    """Nothing has come for as long as the caller wanted to wait; more may come later."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where requests go.

    Attributes:
        secure: TLS or not.
        host: Name or address.
        port: TCP port.
    """

    secure: bool
    host: str
    port: int

    @property
    def netloc(self) -> str:
        """The value of the Host header: a default port is left out, as signatures want it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


class Deadline:
    """How long one request may take: until a point in time, and never long without a byte."""

    def __init__(self, seconds: float, idle: float):
        """Allow `seconds` from now for everything, and `idle` for each wait."""
        self._end = time.monotonic() + seconds
        self._idle = idle

    def left(self) -> float:
        """Return the seconds that are left for everything."""
        return self._end - time.monotonic()

    def wait(self) -> float:
        """Return the seconds that the next wait may take.

        Raises:
            BucketTimeout: The time is over.
        """
        left = self.left()
        if left <= 0:
            raise BucketTimeout("the request took too long as a whole")
        return min(left, self._idle)


class Connection:
    """A connection to an S3 server, for one request at a time.

    Whatever can be done is done at once, and only what cannot is waited for.

    Attributes:
        origin: Where to.
        reused: Whether it has carried a whole exchange before: it may have gone stale since.
        usable: Whether it may carry another one.
    """

    def __init__(self, origin: Origin, connected: socket.socket):
        """Take over a connected socket that does not block; see `http_connect`."""
        self.origin = origin
        self.reused = False
        self.usable = True
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._socket = connected
        self._unwaited = 0
        self._wakes_at = 1

    async def send(self, head: bytes, body: bytes | memoryview, deadline: Deadline) -> None:
        """Send one request.

        Raises:
            ConnectionLost: The server has closed the connection; it may have replied before it did.
            BucketTimeout: It does not take the bytes in time.
        """
        self._wake_at(1)
        whole = memoryview(body)
        # In pieces, so that a socket that takes all at once does not outlast the deadline.
        pieces = [whole[at : at + _PIECE_BYTES] for at in range(0, len(whole), _PIECE_BYTES)]
        for left in (memoryview(head), *pieces):
            while left:
                send = partial(self._socket.send, left)
                sent = await when_ready(self._socket, send, select.POLLOUT, deadline.wait())
                if sent is None:
                    raise BucketTimeout("the server does not take the request in time")
                left = left[sent:]

    async def is_readable(self, seconds: float) -> bool:
        """Wait until something has arrived, or the connection has ended; False after `seconds`."""
        return self in await first_readable([self], seconds)

    def is_quiet(self) -> bool:
        """Say whether nothing has arrived, the end of the connection included."""
        if self.has_buffered():
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def fileno(self) -> int:
        """The socket's descriptor, for `select`."""
        return self._socket.fileno()

    def has_buffered(self) -> bool:
        """Whether bytes have arrived that `select` does not see."""
        pending = self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0
        return self._end > self._start or pending > 0

    async def read_head(self, deadline: Deadline) -> ReplyHead:
        """Receive the head of the reply, passing over interim ones (1xx).

        Raises:
            BadReply: It is none.
            ConnectionLost: The connection ended first.
            BucketTimeout: It does not come in time.
        """
        for _ in range(_MAX_INTERIM_REPLIES):
            head = parse_head(await self._read_until(b"\r\n\r\n", MAX_HEAD_BYTES, deadline))
            if head.status >= 200:
                return head
        raise BadReply("interim replies without end")

    async def read_line(self, deadline: Deadline) -> bytes:
        """Receive a line, without the line break that ends it; raises as `read_head` does."""
        return await self._read_until(b"\r\n", _MAX_LINE_BYTES, deadline)

    async def receive(
        self, into: memoryview, deadline: Deadline, patience: float | None = None, *, due: bool = False
    ) -> int:
        """Receive what is there, up to `len(into)` bytes, at least one.

        Args:
            into: Room for the bytes.
            deadline: Of the whole request.
            patience: Seconds after which the caller would like to think about it; None for the deadline's.
            due: Whether the server has promised to send so many bytes: then they are waited for in larger
                pieces.

        Raises:
            ConnectionLost: The connection has ended.
            BucketTimeout: Nothing comes in time.
            Stalled: Nothing has come for `patience` seconds, which are shorter.
        """
        count = min(self._end - self._start, len(into))
        if count:
            into[:count] = self._view[self._start : self._start + count]
            self._start += count
            return count
        wait = deadline.wait()
        hurried = patience is not None and patience < wait
        seconds = min(wait, wait if patience is None else patience)
        if self._unwaited > _FAIR_BYTES:
            # A server that is faster than we are must not keep the thread from other requests.
            self._unwaited = 0
            await wait_for([(self.fileno(), select.POLLIN)], 0.0)
        receive = partial(self._socket.recv_into, into)
        self._wake_at(len(into) if due else 1)
        got = await when_ready(self._socket, receive, select.POLLIN, seconds)
        if got is None:
            raise (
                Stalled("nothing has come for a while") if hurried else BucketTimeout("nothing came in time")
            )
        if got == 0:
            raise ConnectionLost("the server closed the connection")
        self._unwaited += got
        return got

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _wake_at(self, count: int) -> None:
        """Let a wait end once so many bytes have come: threads that wake for every few are mostly awake."""
        count = min(count, _WAKE_BYTES)
        if count != self._wakes_at and not isinstance(self._socket, ssl.SSLSocket):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._wakes_at = count

    async def _read_until(self, mark: bytes, limit: int, deadline: Deadline) -> bytes:
        found = bytearray()
        while True:
            if self._start == self._end:
                self._start, self._end = 0, await self.receive(self._view, deadline)
            searched = max(0, len(found) - len(mark) + 1)
            before = len(found)
            found += self._view[self._start : self._end]
            at = found.find(mark, searched)
            if at >= 0:
                self._start += at + len(mark) - before
                return bytes(found[:at])
            self._start = self._end
            if len(found) > limit:
                raise BadReply("not a reply of an HTTP server: no end of its head")


class Body:
    """The body of one reply, whichever way its end is told."""

    def __init__(self, connection: Connection, head: ReplyHead, deadline: Deadline):
        """Read the body that follows `head` on `connection`."""
        self._connection = connection
        self._deadline = deadline
        self._chunked = head.chunked
        self._until_close = head.length is None and not head.chunked
        self._left = head.length or 0
        self._in_chunk = False
        self.ended = head.length == 0
        """Whether the body has been received to its end."""

    async def readinto(self, into: memoryview, patience: float | None = None) -> int:
        """Receive up to `len(into)` bytes, at least one; 0 at the end of the body.

        Args:
            into: Room for the bytes.
            patience: See `Connection.receive`.

        Raises:
            ConnectionLost: The connection ended before the body did.
            BadReply: Chunks that are none.
            BucketTimeout: Nothing comes in time.
            Stalled: Nothing has come for `patience` seconds.
        """
        if self._chunked and self._left == 0 and not self.ended:
            await self._next_chunk()
        if self.ended:
            return 0
        if self._until_close:
            try:
                return await self._connection.receive(into, self._deadline, patience)
            except ConnectionLost:
                self.ended = True
                return 0
        count = await self._connection.receive(into[: self._left], self._deadline, patience, due=True)
        self._left -= count
        self.ended = self._left == 0 and not self._chunked
        return count

    async def read(self, limit: int) -> bytes:
        """Receive the rest of the body, but no more than `limit` bytes and what one look brings."""
        data = bytearray()
        piece = memoryview(bytearray(_BUFFER_BYTES))
        while len(data) < limit and (count := await self.readinto(piece)):
            data += piece[:count]
        return bytes(data)

    async def _next_chunk(self) -> None:
        if self._in_chunk and await self._connection.read_line(self._deadline):
            raise BadReply("a chunk does not end where it should")
        line = await self._connection.read_line(self._deadline)
        text, _, _ = line.partition(b";")
        try:
            self._left = _chunk_size(text.strip())
        except ValueError as error:
            raise BadReply(f"not a chunk: {text[:40]!r}") from error
        self._in_chunk = True
        if self._left == 0:
            for _ in range(_MAX_TRAILERS):
                if not await self._connection.read_line(self._deadline):
                    self.ended = True
                    return
            raise BadReply("trailers without end")


async def first_readable(connections: list[Connection], seconds: float) -> list[Connection]:
    """Wait until bytes have arrived on one of `connections`, or it has ended; empty after `seconds`."""
    ready = [connection for connection in connections if connection.has_buffered()]
    if ready:
        return ready
    waited = [(connection.fileno(), select.POLLIN) for connection in connections]
    numbers = await wait_for(waited, seconds)
    return [connection for connection in connections if connection.fileno() in numbers]


async def when_ready(
    waiting: socket.socket, operation: Callable[[], int], events: int, seconds: float
) -> int | None:
    """Do something as soon as a socket lets it; None if it does not for `seconds`."""
    end = None
    while True:
        try:
            return operation()
        except ssl.SSLWantReadError:
            wanted = select.POLLIN
        except ssl.SSLWantWriteError:
            wanted = select.POLLOUT
        except BlockingIOError:
            wanted = events
        except ssl.SSLCertVerificationError:
            raise
        except OSError as error:
            raise ConnectionLost(f"the connection is lost: {error}") from error
        now = time.monotonic()
        end = now + seconds if end is None else end
        if now >= end:
            return None
        # When it is over: less than was waited for may have come.
        await wait_for([(waiting.fileno(), wanted)], end - now)


def _chunk_size(text: bytes) -> int:
    if not 1 <= len(text) <= 15 or not text.isalnum():
        raise ValueError("not a size")
    return int(text, 16)
