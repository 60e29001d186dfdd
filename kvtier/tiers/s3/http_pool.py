"""Connections that wait for their next request."""

from __future__ import annotations

import os
import ssl
import threading
import time

from kvtier.errors import AccessDenied
from kvtier.tiers.s3.http_connect import Connector
from kvtier.tiers.s3.http_connection import Connection, Deadline, Origin

_IDLE_SECONDS = 20.0
"""Servers close connections that rest for longer, often without a word that arrives."""


class ConnectionPool:
    """Keeps idle connections, the last used first. Thread-safe."""

    def __init__(self, limit: int, connect_timeout: float):
        """Make an empty pool.

        Args:
            limit: Idle connections that are kept at most.
            connect_timeout: Seconds that each step of connecting may take.
        """
        self._limit = limit
        self._connector = Connector(connect_timeout)
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._idle: list[tuple[Connection, float]] = []
        self._closed = False

    async def take(self, origin: Origin, deadline: Deadline, *, fresh: bool = False) -> Connection:
        """Return a connection to `origin`, an idle one unless it must be `fresh`.

        Args:
            origin: Where to.
            deadline: Of the request that it is for.
            fresh: Whether idle ones are of no use.

        Raises:
            TierUnavailable: Nobody answers there.
            AccessDenied: The server's certificate is not to be trusted.
        """
        while not fresh and (connection := self._pop(origin)) is not None:
            # What arrives unasked is the end of the connection, or nothing that belongs here.
            if connection.is_quiet():
                return connection
            connection.close()
        return await self._connector.connect(origin, self._context(), deadline)

    def give_back(self, connection: Connection) -> None:
        """Keep a connection whose last reply has been received to its end."""
        connection.reused = True
        now = time.monotonic()
        with self._lock:
            full = self._closed or len(self._idle) >= self._limit
            if not full:
                self._idle.append((connection, now))
            expired = [entry for entry in self._idle if now - entry[1] > _IDLE_SECONDS]
            self._idle = self._idle[len(expired) :]
        for old, _ in expired:
            old.close()
        if full:
            connection.close()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they are given back."""
        self._connector.close()
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection, _ in idle:
            connection.close()

    def _pop(self, origin: Origin) -> Connection | None:
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                if self._idle[place][0].origin == origin:
                    return self._idle.pop(place)[0]
        return None

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                # The variable that botocore reads too: both ways to the bucket trust the same servers.
                bundle = os.environ.get("AWS_CA_BUNDLE")
                try:
                    self._tls = ssl.create_default_context(cafile=bundle)
                except OSError as error:
                    raise AccessDenied(
                        f"AWS_CA_BUNDLE names {bundle}, which holds no certificates: {error}"
                    ) from error
            return self._tls
