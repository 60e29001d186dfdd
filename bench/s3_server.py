"""An S3 server that is never the bottleneck: objects in memory, signatures unchecked.

Keys that contain "/source/" exist at any size without having been written, and what is written below "/sink/"
is thrown away by the kernel, so that a client's own cost shows. For benchmarks on loopback only.

Bodies are sent from the process's memory: `sendfile` would hand single pages of 4 KiB over, which costs the
client twice as much to receive, and the server no less.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SOURCE_BYTES = 64 << 20
_PIECE = 1 << 20


class Store:
    """All objects."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.source = os.urandom(SOURCE_BYTES)
        self.requests: dict[str, int] = {}
        self.lock = threading.Lock()

    def find(self, key: str) -> bytes | None:
        """Return the object of a key."""
        return self.source if "/source/" in key else self.objects.get(key)

    def listing(self, query: dict[str, list[str]]) -> bytes:
        """Return what ListObjectsV2 answers."""
        prefix, after = query.get("prefix", [""])[0], query.get("start-after", [""])[0]
        with self.lock:
            found = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        items = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.objects[key])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in found
        )
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>".encode()


class Client:
    """One connection."""

    def __init__(self, store: Store, connection: socket.socket, latency: float) -> None:
        self.store, self.socket, self.buffer, self.latency = store, connection, b"", latency
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        """Answer until the client goes."""
        try:
            while self.answer():
                pass
        except OSError:
            pass
        finally:
            self.socket.close()

    def answer(self) -> bool:
        """Answer one request; False at the end of the connection."""
        while b"\r\n\r\n" not in self.buffer:
            data = self.socket.recv(65536)
            if not data:
                return False
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        request, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        method, target, _ = request.split(" ")
        if self.latency:
            time.sleep(self.latency)
        parts = urlsplit(target)
        # A path without another slash is a key whose bucket stands in the host name.
        bucket, slash, key = unquote(parts.path).lstrip("/").partition("/")
        key = key if slash or parts.query else bucket
        with self.store.lock:
            self.store.requests[method] = self.store.requests.get(method, 0) + 1
        if method == "PUT":
            self.put(key, headers)
        elif parts.query and "list-type" in parts.query:
            self.reply(200, {"Content-Type": "application/xml"}, self.store.listing(parse_qs(parts.query)))
        else:
            self.get(key, headers.get("range"), with_body=method != "HEAD")
        return True

    def put(self, key: str, headers: dict[str, str]) -> None:
        """Take an object."""
        length = int(headers["content-length"])
        if headers.get("expect"):
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        begun, self.buffer = self.buffer[:length], self.buffer[length:]
        left = length - len(begun)
        if "/sink/" in key:
            scrap = memoryview(bytearray(_PIECE))
            while left:
                left -= self.socket.recv_into(scrap[: min(left, _PIECE)], 0, socket.MSG_TRUNC)
        else:
            data = bytearray(begun)
            while left:
                piece = self.socket.recv(min(left, _PIECE))
                left -= len(piece)
                data += piece
            with self.store.lock:
                if headers.get("if-none-match") and key in self.store.objects:
                    self.reply(412, {}, b"<Error><Code>PreconditionFailed</Code></Error>")
                    return
                self.store.objects[key] = bytes(data)
        self.reply(200, {"ETag": '"0"'}, b"")

    def get(self, key: str, asked: str | None, with_body: bool = True) -> None:
        """Send an object, or a part of it."""
        found = self.store.find(key)
        if found is None:
            self.reply(404, {}, b"<Error><Code>NoSuchKey</Code></Error>")
            return
        start, end = 0, len(found) - 1
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
        if match and match[1]:
            start, end = int(match[1]), min(end, int(match[2] or end))
        elif match:
            start = max(0, len(found) - int(match[2]))
        headers = {"ETag": '"0"'}
        if match:
            headers["Content-Range"] = f"bytes {start}-{end}/{len(found)}"
        self.reply(206 if match else 200, headers, None, end + 1 - start)
        if with_body:
            self.socket.sendall(memoryview(found)[start : end + 1])

    def reply(self, status: int, headers: dict[str, str], body: bytes | None, length: int = 0) -> None:
        """Send a head, and the body if it is given; else `length` bytes are to follow."""
        fields = {**headers, "Content-Length": str(length if body is None else len(body))}
        text = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.socket.sendall(f"HTTP/1.1 {status} S3\r\n{text}\r\n".encode() + (body or b""))


class FastServer:
    """The server in a process of its own; a context manager. `endpoint` is its URL."""

    def __init__(self, latency: float = 0.0) -> None:
        """Prepare a server that rests for `latency` seconds before it answers a request."""
        self._latency = latency

    def __enter__(self) -> FastServer:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._latency)], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()

    def cpu_seconds(self) -> float:
        """Return the CPU seconds that the server has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    store, latency = Store(), float(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=Client(store, connection, latency).serve, daemon=True).start()


if __name__ == "__main__":
    main()
