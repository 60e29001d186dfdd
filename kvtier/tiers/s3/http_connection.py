"""One keep-alive connection: requests go out, replies come back, bodies land where they belong."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers.s3.bucket import BadReply, BucketTimeout, ConnectionLost
from kvtier.tiers.s3.http_wire import MAX_HEAD_BYTES, ReplyHead, parse_head

_BUFFER_BYTES = 8 << 10
"""Room for a reply's head; the beginning of the body that comes with it is copied, the rest is not."""
_MAX_LINE_BYTES = 4 << 10
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
    """A connection to an S3 server. One thread at a time.

    Attributes:
        origin: Where to.
        reused: Whether it has carried a whole exchange before: it may have gone stale since.
        usable: Whether it may carry another one.
    """

    def __init__(self, origin: Origin, tls: ssl.SSLContext, connect_timeout: float):
        """Connect.

        Raises:
            TierUnavailable: Nobody answers there.
            AccessDenied: The server's certificate is not to be trusted.
        """
        self.origin = origin
        self.reused = False
        self.usable = True
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        where = f"{origin.host}:{origin.port}"
        try:
            plain = socket.create_connection((origin.host, origin.port), connect_timeout)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._socket = _secured(plain, tls, origin.host) if origin.secure else plain
        except ssl.SSLCertVerificationError as error:
            raise AccessDenied(
                f"{where}: {error.verify_message}; name the file with the server's CA in AWS_CA_BUNDLE"
            ) from error
        except TimeoutError as error:
            raise BucketTimeout(f"{where}: no connection within {connect_timeout:g} s") from error
        except socket.gaierror as error:
            raise TierUnavailable(
                f"{where}: {error.strerror}; check the endpoint (s3: endpoint) and the name service"
            ) from error
        except OSError as error:
            raise TierUnavailable(f"{where}: {error}") from error

    def send(self, head: bytes, body: bytes | memoryview, deadline: Deadline) -> None:
        """Send one request.

        Raises:
            ConnectionLost: The server has closed the connection; it may have replied before it did.
            BucketTimeout: It does not take the bytes in time.
        """
        with _translated():
            self._socket.settimeout(deadline.wait())
            self._socket.sendall(head)
            # In pieces, because `sendall` counts its time-out over the whole.
            for start in range(0, len(body), 1 << 20):
                self._socket.settimeout(deadline.wait())
                self._socket.sendall(memoryview(body)[start : start + (1 << 20)])

    def is_readable(self, seconds: float) -> bool:
        """Wait until something has arrived, or the connection has ended; False after `seconds`."""
        return self in first_readable([self], seconds)

    def fileno(self) -> int:
        """The socket's descriptor, for `select`."""
        return self._socket.fileno()

    def has_buffered(self) -> bool:
        """Whether bytes have arrived that `select` does not see."""
        pending = self._socket.pending() if isinstance(self._socket, ssl.SSLSocket) else 0
        return self._end > self._start or pending > 0

    def read_head(self, deadline: Deadline) -> ReplyHead:
        """Receive the head of the reply, passing over interim ones (1xx).

        Raises:
            BadReply: It is none.
            ConnectionLost: The connection ended first.
            BucketTimeout: It does not come in time.
        """
        for _ in range(_MAX_INTERIM_REPLIES):
            head = parse_head(self._read_until(b"\r\n\r\n", MAX_HEAD_BYTES, deadline))
            if head.status >= 200:
                return head
        raise BadReply("interim replies without end")

    def read_line(self, deadline: Deadline) -> bytes:
        """Receive a line, without the line break that ends it; raises as `read_head` does."""
        return self._read_until(b"\r\n", _MAX_LINE_BYTES, deadline)

    def receive(self, into: memoryview, deadline: Deadline, patience: float | None = None) -> int:
        """Receive what is there, up to `len(into)` bytes, at least one.

        Args:
            into: Room for the bytes.
            deadline: Of the whole request.
            patience: Seconds after which the caller would like to think about it; None for the deadline's.

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
        try:
            with _translated():
                self._socket.settimeout(patience if hurried else wait)
                count = self._socket.recv_into(into)
        except BucketTimeout as error:
            if hurried:
                raise Stalled("nothing has come for a while") from error
            raise
        if count == 0:
            raise ConnectionLost("the server closed the connection")
        return count

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _read_until(self, mark: bytes, limit: int, deadline: Deadline) -> bytes:
        found = bytearray()
        while True:
            if self._start == self._end:
                self._start, self._end = 0, self.receive(self._view, deadline)
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

    def readinto(self, into: memoryview, patience: float | None = None) -> int:
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
            self._next_chunk()
        if self.ended:
            return 0
        if self._until_close:
            try:
                return self._connection.receive(into, self._deadline, patience)
            except ConnectionLost:
                self.ended = True
                return 0
        count = self._connection.receive(into[: self._left], self._deadline, patience)
        self._left -= count
        self.ended = self._left == 0 and not self._chunked
        return count

    def read(self, limit: int) -> bytes:
        """Receive the rest of the body, but no more than `limit` bytes and what one look brings."""
        data = bytearray()
        piece = memoryview(bytearray(_BUFFER_BYTES))
        while len(data) < limit and (count := self.readinto(piece)):
            data += piece[:count]
        return bytes(data)

    def _next_chunk(self) -> None:
        if self._in_chunk and self._connection.read_line(self._deadline):
            raise BadReply("a chunk does not end where it should")
        text, _, _ = self._connection.read_line(self._deadline).partition(b";")
        try:
            self._left = _chunk_size(text.strip())
        except ValueError as error:
            raise BadReply(f"not a chunk: {text[:40]!r}") from error
        self._in_chunk = True
        if self._left == 0:
            for _ in range(_MAX_TRAILERS):
                if not self._connection.read_line(self._deadline):
                    self.ended = True
                    return
            raise BadReply("trailers without end")


def first_readable(connections: list[Connection], seconds: float) -> list[Connection]:
    """Wait until bytes have arrived on one of `connections`, or it has ended; empty after `seconds`."""
    ready = [connection for connection in connections if connection.has_buffered()]
    if ready:
        return ready
    poll = select.poll()
    for connection in connections:
        poll.register(connection, select.POLLIN)
    numbers = {number for number, _ in poll.poll(max(0.0, seconds) * 1000)}
    return [connection for connection in connections if connection.fileno() in numbers]


def _secured(plain: socket.socket, tls: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    try:
        return tls.wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _chunk_size(text: bytes) -> int:
    if not 1 <= len(text) <= 15 or not text.isalnum():
        raise ValueError("not a size")
    return int(text, 16)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise BucketTimeout("nothing came or went in time") from error
    except OSError as error:
        raise ConnectionLost(f"the connection is lost: {error}") from error
