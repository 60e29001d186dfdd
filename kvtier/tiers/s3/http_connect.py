"""Making connections: looking the name up, connecting to one of its addresses, and TLS."""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers.s3.aside import Aside
from kvtier.tiers.s3.bucket import BucketTimeout, ConnectionLost
from kvtier.tiers.s3.http_connection import Connection, Deadline, Origin, when_ready
from kvtier.tiers.s3.waiting import wait_for

_THREADS = 8


class Connector:
    """Connects to servers; none of its waits is longer than it is told, or holds up others. Thread-safe."""

    def __init__(self, connect_timeout: float):
        """Prepare.

        Args:
            connect_timeout: Seconds that each step may take: name, connection, TLS.
        """
        self._timeout = connect_timeout
        self._names = Aside("s3-names", _THREADS)

    async def connect(self, origin: Origin, tls: ssl.SSLContext, deadline: Deadline) -> Connection:
        """Connect.

        Raises:
            TierUnavailable: Nobody answers there.
            AccessDenied: The server's certificate is not to be trusted.
        """
        where = f"{origin.host}:{origin.port}"
        try:
            addresses = await self._look_up(origin, self._seconds(deadline))
            plain = await _connected(addresses, self._seconds(deadline))
            return Connection(origin, await _secured(plain, tls, origin, self._seconds(deadline)))
        except ssl.SSLCertVerificationError as error:
            raise AccessDenied(
                f"{where}: {error.verify_message}; name the file with the server's CA in AWS_CA_BUNDLE"
            ) from error
        except TimeoutError as error:
            raise BucketTimeout(f"{where}: no connection within {self._timeout:g} s") from error
        except (socket.gaierror, UnicodeError) as error:
            raise TierUnavailable(
                f"{where}: {error}; check the endpoint (s3.endpoint) and the name service"
            ) from error
        except (OSError, ConnectionLost) as error:
            raise TierUnavailable(
                f"{where}: {error}; check the endpoint (s3.endpoint), and that the server runs"
            ) from error

    def close(self) -> None:
        """Look no more names up."""
        self._names.close()

    def _seconds(self, deadline: Deadline) -> float:
        return min(self._timeout, max(0.0, deadline.left()))

    async def _look_up(self, origin: Origin, seconds: float) -> Sequence[Any]:
        look_up = partial(socket.getaddrinfo, origin.host, origin.port, type=socket.SOCK_STREAM)
        try:
            return look_up(flags=socket.AI_NUMERICHOST)
        except socket.gaierror:
            # A name service may take its time, as long as it likes.
            return await self._names.call(look_up, seconds, f"the name service, asked for {origin.host},")


async def _connected(addresses: Sequence[Any], seconds: float) -> socket.socket:
    """Connect to the first address that answers; each gets its share of what is left of `seconds`."""
    failure: OSError = socket.gaierror(socket.EAI_NONAME, "no address")
    end = time.monotonic() + seconds
    for place, (family, kind, protocol, _, address) in enumerate(addresses):
        share = max(0.0, end - time.monotonic()) / (len(addresses) - place)
        plain = socket.socket(family, kind, protocol)
        try:
            plain.setblocking(False)
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            code = plain.connect_ex(address)
            if code == errno.EINPROGRESS:
                if not await wait_for([(plain.fileno(), select.POLLOUT)], share):
                    raise TimeoutError
                code = plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code))
        except OSError as error:
            plain.close()
            failure = error
        except BaseException:
            plain.close()
            raise
        else:
            return plain
    raise failure


async def _secured(
    plain: socket.socket, tls: ssl.SSLContext, origin: Origin, seconds: float
) -> socket.socket:
    if not origin.secure:
        return plain
    try:
        secured = tls.wrap_socket(plain, server_hostname=origin.host, do_handshake_on_connect=False)
    except BaseException:
        plain.close()
        raise
    try:

        def shake_hands() -> int:
            secured.do_handshake()
            return 1

        if await when_ready(secured, shake_hands, select.POLLIN, seconds) is None:
            raise TimeoutError
    except BaseException:
        secured.close()
        raise
    return secured
