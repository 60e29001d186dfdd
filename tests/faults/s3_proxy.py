"""An HTTP proxy before a real S3 server that spoils chosen replies, as no real server can be made to."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

HOP_HEADERS = {"connection", "transfer-encoding", "keep-alive", "content-length"}


@dataclass
class Reply:
    """A reply on its way to the client.

    Attributes:
        status: HTTP status.
        headers: Without Content-Length and connection headers.
        body: What is sent of the body.
        length: What Content-Length says; None for the body's true length.
        hang: Send nothing more after the body until the proxy closes; nothing at all if the status is 0.
        trickle: Seconds after each KiB of the body.
        delay: Seconds before the first byte.
        reset: End with a TCP reset.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    length: int | None = None
    hang: bool = False
    trickle: float = 0.0
    delay: float = 0.0
    reset: bool = False


Spoil = Callable[[Reply], Reply]


def named(name: str, spoil: Spoil) -> Spoil:
    """Name a fault for the list of tests."""
    spoil.__name__ = name
    return spoil


def error(status: int, code: str) -> Spoil:
    """Answer with an S3 error instead."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>spoilt</Message></Error>".encode()
    return named(f"{code}-{status}", lambda reply: Reply(status, {"Content-Type": "application/xml"}, body))


def html(status: int) -> Spoil:
    """Answer with the page of some proxy that stands in between."""
    page = b"<html><head><title>Sign in</title></head><body>Please sign in to the network.</body></html>"
    return named(f"html-{status}", lambda reply: Reply(status, {"Content-Type": "text/html"}, page))


def range_ignored(reply: Reply) -> Reply:
    """Answer 200 as a server does that does not know ranges."""
    headers = {name: value for name, value in reply.headers.items() if name.lower() != "content-range"}
    return Reply(200, headers, reply.body)


def broken_off(reply: Reply) -> Reply:
    """End the connection in the middle of the body."""
    return Reply(reply.status, reply.headers, reply.body[: len(reply.body) // 2], len(reply.body))


def shortened(reply: Reply) -> Reply:
    """Announce and send half of the body only."""
    return Reply(reply.status, reply.headers, reply.body[: len(reply.body) // 2])


def lengthened(reply: Reply) -> Reply:
    """Announce and send more than was asked for."""
    return Reply(reply.status, reply.headers, reply.body + bytes(100))


def shifted(reply: Reply) -> Reply:
    """Send another range of the same length, and say so."""
    start, _, rest = reply.headers["Content-Range"].removeprefix("bytes ").partition("-")
    end, _, size = rest.partition("/")
    headers = {**reply.headers, "Content-Range": f"bytes {int(start) + 7}-{int(end) + 7}/{size}"}
    return Reply(reply.status, headers, reply.body[7:] + bytes(7))


def unlabelled(reply: Reply) -> Reply:
    """Leave the Content-Range out of a 206."""
    return Reply(206, {}, reply.body)


def stalled(reply: Reply) -> Reply:
    """Stop in the middle of the body, and keep the connection."""
    return Reply(reply.status, reply.headers, reply.body[: len(reply.body) // 2], len(reply.body), hang=True)


def trickling(reply: Reply) -> Reply:
    """Send the body so slowly that it never ends, but never rests either."""
    return Reply(reply.status, reply.headers, reply.body, trickle=0.01)


def flipped(reply: Reply) -> Reply:
    """Change one bit in the middle of the body."""
    body = bytearray(reply.body)
    if body:
        body[len(body) // 2] ^= 4
    return Reply(reply.status, reply.headers, bytes(body))


def reset(reply: Reply) -> Reply:
    """Reset the connection in the middle of the body."""
    half = reply.body[: len(reply.body) // 2]
    return Reply(reply.status, reply.headers, half, len(reply.body), reset=True)


def delayed(reply: Reply) -> Reply:
    """Answer late, but in time."""
    return Reply(reply.status, reply.headers, reply.body, delay=0.15)


def hung(reply: Reply) -> Reply:
    """Never answer."""
    return Reply(0, hang=True)


class FaultyProxy:
    """Forwards every request to `upstream`; replies to those that `choose` picks go through a `Spoil`.

    Signatures stay valid: SigV4 signs the Host header, which is passed on as the client sent it.

    Attributes:
        endpoint: URL for the client.
        choose: Called with method, path and headers of each request; returns what spoils its reply, or None.
    """

    def __init__(self, upstream: str) -> None:
        self.choose: Callable[[str, str, dict[str, str]], Spoil | None] = lambda method, path, headers: None
        self._upstream = urlsplit(upstream).netloc
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            reply = connection.getresponse()
            kept = {name: value for name, value in reply.getheaders() if name.lower() not in HOP_HEADERS}
            return Reply(reply.status, kept, reply.read())
        finally:
            connection.close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self) -> None:
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                body = self.rfile.read(int(headers.get("Content-Length", 0)))
                spoil = proxy.choose(self.command, self.path, headers)
                reply = proxy._forward(self.command, self.path, headers, body)
                self.answer(spoil(reply) if spoil else reply)

            do_GET = do_PUT = do_DELETE = do_HEAD = do_POST = serve

            def answer(self, reply: Reply) -> None:
                time.sleep(reply.delay)
                if reply.status:
                    self.send(reply)
                if reply.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                if reply.hang:
                    proxy._closing.wait()
                    self.close_connection = True

            def send(self, reply: Reply) -> None:
                self.send_response_only(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                announced = len(reply.body) if reply.length is None else reply.length
                self.send_header("Content-Length", str(announced))
                self.end_headers()
                step = 1024 if reply.trickle else len(reply.body) or 1
                for start in range(0, len(reply.body), step):
                    self.wfile.write(reply.body[start : start + step])
                    time.sleep(reply.trickle)
                self.close_connection = announced != len(reply.body)

            def log_message(self, *arguments: object) -> None:
                pass

        return Handler
