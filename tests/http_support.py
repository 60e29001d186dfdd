"""A server that tests script byte by byte, for our own HTTP client."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator

import pytest

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.tiers.s3.bucket import Bucket
from kvtier.tiers.s3.http_bucket import HttpBucket

DATA = bytes(range(256)) * 400


class ScriptedServer:
    """Answers each request with what `answer` returns: bytes to send, or None to close the connection.

    Attributes:
        requests: The heads of all requests so far.
        connections: How many were made.
    """

    def __init__(self, answer: Callable[[str], bytes | None], tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self.requests: list[str] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        scheme = "https" if tls else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with self._tls.wrap_socket(connection, server_side=True) if self._tls else connection as stream:
                self._answer_all(stream)
        except OSError:
            pass

    def _answer_all(self, stream: socket.socket) -> None:
        data = b""
        while True:
            while b"\r\n\r\n" not in data:
                more = stream.recv(65536)
                if not more:
                    return
                data += more
            head, _, data = data.partition(b"\r\n\r\n")
            text = head.decode("latin-1")
            sizes = [int(line[15:]) for line in text.split("\r\n") if line.startswith("Content-Length")]
            length = sizes[0] if sizes else 0
            while len(data) < length:
                data += stream.recv(65536)
            self.bodies.append(data[:length])
            data = data[length:]
            self.requests.append(text)
            reply = self.answer(text)
            if reply is None:
                return
            stream.sendall(reply)
            if b"Connection: close" in reply.partition(b"\r\n\r\n")[0]:
                return


Serve = Callable[..., ScriptedServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("KVTIER_TEST_KEY", "key")
    running: list[ScriptedServer] = []

    def start(answer: Callable[[str], bytes | None], tls: ssl.SSLContext | None = None) -> ScriptedServer:
        running.append(ScriptedServer(answer, tls))
        return running[-1]

    yield start
    for server in running:
        server.close()


def bucket_at(endpoint: str, counters: Counters | None = None, **changes: object) -> HttpBucket:
    settings = {
        "bucket": "bucket",
        "endpoint": endpoint,
        "access_key_env": "KVTIER_TEST_KEY",
        "secret_key_env": "KVTIER_TEST_KEY",
        # Far beyond what a busy machine needs: tests of slow servers say so themselves.
        "read_timeout": 20.0,
        "connect_timeout": 20.0,
        **changes,
    }
    return HttpBucket(S3Config(**settings), counters or Counters())


def reply(status: int, body: bytes = b"", **headers: object) -> bytes:
    fields = {"Content-Length": len(body), **{name.replace("_", "-"): text for name, text in headers.items()}}
    lines = "".join(f"{name}: {text}\r\n" for name, text in fields.items() if text is not None)
    return f"HTTP/1.1 {status} Some Words\r\n{lines}\r\n".encode() + body


def asked_range(head: str) -> tuple[int, int]:
    [line] = [line for line in head.split("\r\n") if line.startswith("Range: bytes=")]
    start, _, end = line.removeprefix("Range: bytes=").partition("-")
    return int(start), int(end)


def serving(head: str) -> bytes:
    start, end = asked_range(head)
    return reply(206, DATA[start : end + 1], Content_Range=f"bytes {start}-{end}/{len(DATA)}")


def chunked(data: bytes, step: int, tail: bytes = b"\r\n") -> bytes:
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    return b"".join(b"%x;x=y\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n" + tail


def read(bucket: Bucket, start: int = 100, length: int = 50_000) -> bytes:
    into = bytearray(length)
    bucket.get_range("some key/!x", start, memoryview(into))
    return bytes(into)
