"""Requests to a bucket over our own HTTP/1.1: signed, redirected, hedged, on connections that are kept."""

from __future__ import annotations

import re
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit

from kvtier import __version__
from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.errors import AccessDenied, TierError
from kvtier.tiers.s3.bucket import ConnectionLost
from kvtier.tiers.s3.hedge import Hedges
from kvtier.tiers.s3.http_connection import Body, Connection, Deadline, Origin, first_readable
from kvtier.tiers.s3.http_pool import ConnectionPool
from kvtier.tiers.s3.http_wire import ReplyHead, write_head
from kvtier.tiers.s3.signing import Signer
from kvtier.tiers.s3.waiting import unless

_MAX_REDIRECTS = 3
_REDIRECTS = {301, 302, 307, 308}
_LASTING = {301, 308}
_EARLY_REPLY_SECONDS = 0.2
_AWS_HOST = re.compile(r"(?P<front>(?:.+\.)?s3)(?:[.-][a-z0-9-]+)?(?P<end>\.amazonaws\.com(?:\.cn)?)")


@dataclass(frozen=True, slots=True)
class Address:
    """Where the bucket is.

    Attributes:
        origin: The server.
        path: What stands before an object's key in a request's target, percent-encoded: "" or "/BUCKET".
        region: What requests are signed for.
    """

    origin: Origin
    path: str
    region: str

    def target(self, key: str) -> str:
        """Return the target of a request for an object."""
        return f"{self.path}/{encode_key(key)}"


def encode_key(key: str) -> str:
    """Percent-encode a key as SigV4 wants it: all but letters, digits, `-._~` and slashes."""
    return quote(key, safe="/-._~")


def address_of(endpoint: str, bucket: str, path_style: bool, region: str) -> Address:
    """Return the address of a bucket at an endpoint (a URL); the bucket goes into path or host name."""
    parts = urlsplit(endpoint)
    secure = parts.scheme == "https"
    host = parts.hostname or ""
    path = parts.path.rstrip("/")
    # Certificates for *.s3.amazonaws.com do not cover names with more dots.
    if path_style or (secure and "." in bucket):
        path += f"/{bucket}"
    else:
        host = f"{bucket}.{host}"
    return Address(Origin(secure, host, parts.port or (443 if secure else 80)), path, region)


def redirected(address: Address, head: ReplyHead, key: str) -> Address | None:
    """Return where a reply says that the bucket is, None where it names no usable other place."""
    region = head.headers.get("x-amz-bucket-region")
    if region and region != address.region and re.fullmatch("[a-z0-9-]{1,40}", region):
        aws = _AWS_HOST.fullmatch(address.origin.host)
        host = f"{aws['front']}.{region}{aws['end']}" if aws else address.origin.host
        return replace(address, region=region, origin=replace(address.origin, host=host))
    try:
        parts = urlsplit(head.headers.get("location", ""))
        port = parts.port
    except ValueError:
        return None
    target = unquote(parts.path)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not target.endswith(f"/{key}")
        # The server must not talk us into sending in the clear what was meant for TLS.
        or (address.origin.secure and parts.scheme != "https")
    ):
        return None
    secure = parts.scheme == "https"
    origin = Origin(secure, parts.hostname, port or (443 if secure else 80))
    moved = Address(origin, quote(target[: -len(key) - 1], safe="/-._~"), address.region)
    return None if moved == address else moved


class Reply:
    """A reply; at its end (it is a context manager) the connection is kept if it can be.

    Attributes:
        head: Its head.
        body: Its body, to be received.
    """

    def __init__(self, head: ReplyHead, body: Body, connection: Connection, pool: ConnectionPool):
        """Take over the connection, which goes back to `pool`."""
        self.head = head
        self.body = body
        self._connection = connection
        self._pool = pool

    def __enter__(self) -> tuple[ReplyHead, Body]:
        """Return head and body."""
        return self.head, self.body

    def __exit__(self, *error: object) -> None:
        """Keep the connection, or close it."""
        if self.body.ended and self.head.keep_alive and self._connection.usable:
            self._pool.give_back(self._connection)
        else:
            self._connection.close()


class Exchange:
    """Makes requests for objects of one bucket. Thread-safe.

    Attributes:
        hedges: What is known about how long requests take, and how many may be made twice.
    """

    def __init__(
        self,
        config: S3Config,
        counters: Counters,
        locate: Callable[[], Address],
        signer: Signer,
    ):
        """Prepare; nothing is connected or looked up yet.

        Args:
            config: Time-outs and concurrency.
            counters: Gets hedged requests, stale connections and redirects.
            locate: Finds the bucket's address, when the first request is made.
            signer: Signs them.
        """
        self._counters = counters
        self._locate = locate
        self._signer = signer
        # Reads, uploads, index: none of them waits for a connection.
        self._pool = ConnectionPool(config.concurrency + 32, config.connect_timeout)
        self.hedges = Hedges()
        self._lock = threading.Lock()
        self._address: Address | None = None

    async def request(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str],
        body: bytes,
        deadline: Deadline,
        query: str = "",
    ) -> Reply:
        """Make one request and give its reply, a context manager.

        Args:
            method: HTTP method.
            key: The object; empty for the bucket.
            headers: What is to be signed besides the host.
            body: What is sent.
            deadline: Of everything up to the end of the reply.
            query: Encoded and in order, as it is signed.

        Raises:
            TierUnavailable: No reply, or not in time.
            AccessDenied: No credentials, or a certificate that is not to be trusted.
            BadReply: A reply of something that is no HTTP server.
        """
        connection, head = await self._follow(method, key, headers, body, deadline, query)
        return Reply(head, Body(connection, head, deadline), connection, self._pool)

    def renew_credentials(self) -> None:
        """Look the credentials up anew for the next request."""
        self._signer.forget()

    def close(self) -> None:
        """Close idle connections, and look neither names nor credentials up any more."""
        self._pool.close()
        self._signer.close()

    async def _follow(
        self,
        method: str,
        key: str,
        headers: Mapping[str, str],
        body: bytes,
        deadline: Deadline,
        query: str,
    ) -> tuple[Connection, ReplyHead]:
        with self._lock:
            if self._address is None:
                self._address = self._locate()
            address = self._address
        for _ in range(_MAX_REDIRECTS):
            target = f"{address.target(key)}?{query}" if query else address.target(key)
            connection, head = await self._ask(address, method, target, headers, body, deadline)
            # 400 is how a wrong region in the signature is answered.
            moved = redirected(address, head, key) if head.status in _REDIRECTS | {400} else None
            if moved is None:
                return connection, head
            connection.close()
            self._counters.add("redirects")
            if head.status in _LASTING or moved.region != address.region:
                with self._lock:
                    self._address = moved
            address = moved
        raise AccessDenied(
            f"{method} {key}: redirected in a circle; check region and endpoint (s3.region, s3.endpoint)"
        )

    async def _ask(
        self,
        address: Address,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        deadline: Deadline,
    ) -> tuple[Connection, ReplyHead]:
        head = await self._head(address, method, target, headers, body, deadline)
        connection = await self._pool.take(address.origin, deadline)
        # Listings take longer than reads, and nobody waits for them.
        hedged = method == "GET" and "?" not in target
        try:
            return await self._exchange(connection, head, body, deadline, hedged)
        except ConnectionLost:
            if not connection.reused:
                raise
            self._counters.add("stale_connections")
        fresh = await self._pool.take(address.origin, deadline, fresh=True)
        return await self._exchange(fresh, head, body, deadline, hedged)

    async def _head(
        self,
        address: Address,
        method: str,
        target: str,
        headers: Mapping[str, str],
        body: bytes,
        deadline: Deadline,
    ) -> bytes:
        scheme = "https" if address.origin.secure else "http"
        url = f"{scheme}://{address.origin.netloc}{target}"
        plain = {"Host": address.origin.netloc, **headers}
        signed = await self._signer.sign(method, url, plain, address.region, deadline.wait())
        # Not signed: middle boxes may change them.
        signed["User-Agent"] = f"kvtier/{__version__}"
        if method == "PUT":
            signed["Content-Length"] = str(len(body))
        return write_head(method, target, signed)

    async def _exchange(
        self, connection: Connection, head: bytes, body: bytes, deadline: Deadline, hedged: bool
    ) -> tuple[Connection, ReplyHead]:
        """Send a request and receive the head of the reply, perhaps on a second connection."""
        try:
            await self._send(connection, head, body, deadline)
            if hedged:
                connection = await self._hedged(connection, head, deadline)
            return connection, await connection.read_head(deadline)
        except BaseException:
            connection.close()
            raise

    async def _send(self, connection: Connection, head: bytes, body: bytes, deadline: Deadline) -> None:
        try:
            await connection.send(head, body, deadline)
        except ConnectionLost:
            # A server that refuses a large body replies and closes before it has read it.
            connection.usable = False
            if not body or not await connection.is_readable(_EARLY_REPLY_SECONDS):
                raise

    async def _hedged(self, connection: Connection, head: bytes, deadline: Deadline) -> Connection:
        """Wait for the first byte; ask a second time if it is late, and keep what answers first."""
        delay, start = self.hedges.delay(), time.monotonic()
        wait = deadline.wait()
        late = not await connection.is_readable(wait if delay is None else min(delay, wait))
        if late and delay is not None and self.hedges.take():
            connection = await self._race(connection, head, deadline)
        self.hedges.report(time.monotonic() - start)
        return connection

    async def _race(self, first: Connection, head: bytes, deadline: Deadline) -> Connection:
        self._counters.add("hedged_requests")
        try:
            # Should the first one answer while the second is being made, that is all the better.
            asked = self._ask_again(first.origin, head, deadline)
            second = await unless(asked, [(first.fileno(), select.POLLIN)])
        except TierError:
            second = None
        if second is None:
            # The first request is as good as it was before.
            return first
        try:
            ready = await first_readable([first, second], deadline.wait())
        except TierError:
            second.close()
            raise
        if second in ready and first not in ready:
            self._counters.add("hedges_won")
            first.close()
            return second
        second.close()
        return first

    async def _ask_again(self, origin: Origin, head: bytes, deadline: Deadline) -> Connection:
        connection = await self._pool.take(origin, deadline)
        try:
            await connection.send(head, b"", deadline)
        except BaseException:
            connection.close()
            raise
        return connection
