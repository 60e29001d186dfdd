"""Our own HTTP client against servers that tests script byte by byte."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.errors import AccessDenied, KvTierError, TierFull, TierUnavailable
from kvtier.tiers.s3.bucket import BadReply, BucketThrottled, BucketTimeout, ConnectionLost, ObjectMissing
from kvtier.tiers.s3.hedge import Hedges
from kvtier.tiers.s3.http_bucket import HttpBucket
from kvtier.tiers.s3.http_connection import Origin
from kvtier.tiers.s3.http_exchange import Address, address_of, encode_key, redirected
from kvtier.tiers.s3.http_wire import ReplyHead, parse_head, write_head
from kvtier.tiers.s3.replies import error_of, read_error, retry_after

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
        "read_timeout": 2.0,
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


def read(bucket: HttpBucket, start: int = 100, length: int = 50_000) -> bytes:
    into = bytearray(length)
    bucket.get_range("some key/!x", start, memoryview(into))
    return bytes(into)


def test_one_connection_carries_many_requests(serve: Serve) -> None:
    server = serve(serving)
    bucket = bucket_at(server.endpoint)
    for start in range(0, 50_000, 10_000):
        assert read(bucket, start) == DATA[start : start + 50_000]
    assert server.connections == 1
    first = server.requests[0]
    assert first.startswith("GET /bucket/some%20key/%21x HTTP/1.1\r\n")
    assert f"Host: 127.0.0.1:{server.port}\r\n" in first
    assert "Authorization: AWS4-HMAC-SHA256 Credential=key/" in first


@pytest.mark.parametrize("step", [1, 7, 4096, 50_000])
@pytest.mark.parametrize("tail", [b"\r\n", b"X-Sum: 1\r\nX-Other: 2\r\n\r\n"])
def test_chunked_bodies(serve: Serve, step: int, tail: bytes) -> None:
    length = 2_000 if step == 1 else 50_000

    def answer(head: str) -> bytes:
        start, end = asked_range(head)
        body = chunked(DATA[start : end + 1], step, tail)
        label = f"bytes {start}-{end}/{len(DATA)}"
        return reply(206, Content_Length=None, Transfer_Encoding="chunked", Content_Range=label) + body

    server = serve(answer)
    bucket = bucket_at(server.endpoint)
    for _ in range(2):
        assert read(bucket, length=length) == DATA[100 : 100 + length]
    assert server.connections == 1


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"8\r\nabcdefgh\r\n0\r\n\r\n",
        b"2\r\nab\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\n",
        b"4\r\nabcd\r\n0\r\n" + b"a: b\r\n" * 100,
        b"4\r\nabcd\r\n1\r\nx\r\n0\r\n\r\n",
        b"x" * 100_000,
    ],
)
def test_chunks_that_are_none_are_bad_replies(serve: Serve, body: bytes) -> None:
    head = reply(206, Content_Length=None, Transfer_Encoding="chunked", Content_Range="bytes 100-103/1000")
    bucket = bucket_at(serve(lambda text: head + body).endpoint)
    with pytest.raises(BadReply):
        read(bucket, length=4)


def test_a_body_that_ends_with_the_connection(serve: Serve) -> None:
    def answer(head: str) -> bytes:
        start, end = asked_range(head)
        label = f"bytes {start}-{end}/{len(DATA)}"
        body = DATA[start : end + 1]
        return reply(206, body, Content_Length=None, Connection="close", Content_Range=label)

    server = serve(answer)
    assert read(bucket_at(server.endpoint)) == DATA[100:50_100]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"220 smtp ready\r\n\r\n",
        b"HTTP/1.1 206 x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
        b"HTTP/1.1 206 x\r\nContent-Length: -4\r\n\r\nabcd",
        b"HTTP/1.1 206 x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nabcd",
        b"HTTP/1.1 206 x\r\nTransfer-Encoding: gzip\r\n\r\nabcd",
        b"HTTP/1.1 206 x\r\n folded: 1\r\n\r\nabcd",
        b"HTTP/1.1 206 x\r\nContent-Length: 4\r\nContent-Range: bytes 9-2/4\r\n\r\nabcd",
        b"HTTP/1.1 206 x\r\n" + b"a: b\r\n" * 20_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 20,
    ],
)
def test_replies_of_no_s3_server_are_failures(serve: Serve, raw: bytes) -> None:
    bucket = bucket_at(serve(lambda head: raw or None).endpoint)
    with pytest.raises((BadReply, ConnectionLost)):
        read(bucket, length=4)


def test_interim_replies_are_passed_over(serve: Serve) -> None:
    server = serve(lambda head: b"HTTP/1.1 100 Continue\r\n\r\n" + serving(head))
    assert read(bucket_at(server.endpoint)) == DATA[100:50_100]


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_are_bad_replies(data: bytes) -> None:
    for text in (data, b"HTTP/1.1 200 OK\r\n" + data):
        try:
            head = parse_head(text)
        except BadReply:
            continue
        assert 100 <= head.status <= 599
        assert head.length is None or head.length >= 0


def test_headers_cannot_smuggle_lines() -> None:
    with pytest.raises(ValueError, match="line break"):
        write_head("GET", "/", {"Host": "a\r\nX: y"})
    with pytest.raises(ValueError, match="line break"):
        write_head("GET", "/\n", {"Host": "a"})


def test_a_stale_connection_is_replaced_once(serve: Serve) -> None:
    counters = Counters()
    server = serve(serving)
    bucket = bucket_at(server.endpoint, counters)
    read(bucket)
    seen: list[str] = []

    def closing_first(head: str) -> bytes | None:
        seen.append(head)
        return None if len(seen) == 1 else serving(head)

    server.answer = closing_first
    assert read(bucket) == DATA[100:50_100]
    assert counters.snapshot()["stale_connections"] == 1
    assert server.connections == 2


def test_a_fresh_connection_that_is_closed_is_a_failure(serve: Serve) -> None:
    server = serve(lambda head: None)
    with pytest.raises(ConnectionLost):
        read(bucket_at(server.endpoint))
    assert server.connections == 2, "asked once, and once for the rest"


def test_connections_that_the_server_has_closed_are_not_used(serve: Serve) -> None:
    counters = Counters()
    server = serve(
        lambda head: reply(206, DATA[100:104], Content_Range="bytes 100-103/1000", Connection="close")
    )
    bucket = bucket_at(server.endpoint, counters)
    for _ in range(3):
        assert read(bucket, length=4) == DATA[100:104]
    assert server.connections == 3
    assert "stale_connections" not in counters.snapshot()


def test_small_error_replies_keep_the_connection(serve: Serve) -> None:
    server = serve(lambda head: reply(404, b"<Error><Code>NoSuchKey</Code></Error>"))
    bucket = bucket_at(server.endpoint)
    for _ in range(3):
        with pytest.raises(ObjectMissing):
            read(bucket)
    assert server.connections == 1


@pytest.mark.parametrize("status", [301, 307])
def test_redirects_are_followed_and_signed_anew(serve: Serve, status: int) -> None:
    right = serve(serving)
    location = f"http://localhost:{right.port}/bucket/some%20key/!x"
    wrong = serve(lambda head: reply(status, b"<Error/>", Location=location))
    bucket = bucket_at(wrong.endpoint)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    assert f"Host: localhost:{right.port}\r\n" in right.requests[0]
    # What moved for good is not asked for in the old place again.
    assert len(wrong.requests) == (1 if status == 301 else 3)


def test_a_put_is_redirected_with_its_body(serve: Serve) -> None:
    right = serve(lambda head: reply(200, ETag='"1"'))
    wrong = serve(lambda head: reply(307, Location=f"{right.endpoint}/bucket/a/b"))
    assert bucket_at(wrong.endpoint).put("a/b", DATA)
    assert right.bodies == [DATA]


@pytest.mark.parametrize("status", [301, 400])
def test_a_wrong_region_is_corrected(serve: Serve, status: int) -> None:
    def answer(head: str) -> bytes:
        if "/eu-west-3/s3/aws4_request" in head:
            return serving(head)
        return reply(
            status, b"<Error><Code>PermanentRedirect</Code></Error>", x_amz_bucket_region="eu-west-3"
        )

    server = serve(answer)
    bucket = bucket_at(server.endpoint)
    for _ in range(2):
        assert read(bucket) == DATA[100:50_100]
    assert len(server.requests) == 3


def test_redirects_in_a_circle_end(serve: Serve) -> None:
    server = serve(lambda head: None)
    turn = iter(range(100))
    server.answer = lambda head: reply(307, Location=f"{server.endpoint}/{next(turn)}/some%20key/!x")
    with pytest.raises(AccessDenied, match="circle"):
        read(bucket_at(server.endpoint))


def test_redirects_go_to_no_worse_place() -> None:
    secure = Address(Origin(True, "bucket.s3.amazonaws.com", 443), "", "us-east-1")

    def moved(**headers: str) -> Address | None:
        names = {name.replace("_", "-"): text for name, text in headers.items()}
        return redirected(secure, ReplyHead(301, names, 0, False, True), "a/key")

    assert moved(location="http://bucket.s3.amazonaws.com/a/key") is None
    assert moved(location="https://bucket.s3.amazonaws.com/other") is None
    assert moved(location="/a/key") is None
    assert moved() is None
    there = moved(x_amz_bucket_region="eu-west-1")
    assert there == Address(Origin(True, "bucket.s3.eu-west-1.amazonaws.com", 443), "", "eu-west-1")
    assert moved(location="https://elsewhere:444/b/a/key") == Address(
        Origin(True, "elsewhere", 444), "/b", "us-east-1"
    )


def test_addresses() -> None:
    virtual = address_of("https://s3.eu-west-1.amazonaws.com", "team", False, "eu-west-1")
    assert (virtual.origin.netloc, virtual.target("a b")) == ("team.s3.eu-west-1.amazonaws.com", "/a%20b")
    path = address_of("http://[::1]:9000/", "team", True, "x")
    assert (path.origin.netloc, path.target("k")) == ("[::1]:9000", "/team/k")
    dotted = address_of("https://s3.amazonaws.com", "a.b", False, "us-east-1")
    assert (dotted.origin.host, dotted.path) == ("s3.amazonaws.com", "/a.b")
    assert encode_key("a/b!c*(d)'_-.~") == "a/b%21c%2A%28d%29%27_-.~"


def test_a_refusal_that_comes_before_the_body_was_read_is_understood(serve: Serve) -> None:
    """The server replies and closes while the client is still sending."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(reply(403, b"<Error><Code>AccessDenied</Code></Error>", Connection="close"))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass
        connection.close()

    serve(lambda head: None)
    threading.Thread(target=refuse, daemon=True).start()
    with pytest.raises(AccessDenied):
        bucket_at(f"http://127.0.0.1:{listener.getsockname()[1]}").put("key", bytes(8 << 20))
    listener.close()


def test_a_request_has_a_deadline_as_a_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps the connection from resting, and the request from nothing."""
    monkeypatch.setattr("kvtier.tiers.s3.http_bucket.SLOWEST_BYTES_PER_SECOND", 1 << 30)
    listener = socket.create_server(("127.0.0.1", 0))
    given_up = threading.Event()

    def trickle() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        head = reply(206, Content_Length=1000, Content_Range="bytes 100-1099/2000")
        try:
            for byte in head + bytes(1000):
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            given_up.set()

    serve(lambda head: None)
    threading.Thread(target=trickle, daemon=True).start()
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    bucket = bucket_at(endpoint, read_timeout=1.0, connect_timeout=0.1)
    with pytest.raises(BucketTimeout):
        read(bucket, length=1000)
    assert given_up.wait(30)
    listener.close()


def test_slow_first_bytes_are_asked_for_a_second_time(serve: Serve) -> None:
    counters = Counters()
    hang = threading.Event()
    asked: list[str] = []

    def answer(head: str) -> bytes:
        asked.append(head)
        if len(asked) == 65:
            hang.wait(30)
        return serving(head)

    server = serve(answer)
    bucket = bucket_at(server.endpoint, counters, read_timeout=60)
    for _ in range(65):
        assert read(bucket) == DATA[100:50_100]
    assert counters.snapshot()["hedges_won"] == 1
    assert not hang.is_set(), "the slow request was not waited for"
    hang.set()


def test_hedges_are_few_however_slow_the_bucket_is() -> None:
    hedges = Hedges()
    assert hedges.delay() is None
    assert not hedges.take()
    granted = 0
    for _ in range(2000):
        hedges.report(0.1)
        granted += hedges.take()
    assert 0 < granted <= 2000 * 0.05
    assert hedges.delay() == pytest.approx(0.15)


def certificate(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a self-signed certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    key, file = directory / "key.pem", directory / "certificate.pem"
    command = (
        f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=kvtier-tests "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {file}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return context, file


def test_tls_with_a_ca_of_ones_own(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, file = certificate(tmp_path)
    server = serve(serving, context)
    with pytest.raises(AccessDenied, match="AWS_CA_BUNDLE"):
        read(bucket_at(server.endpoint))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
    bucket = bucket_at(server.endpoint)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    with pytest.raises(AccessDenied, match="AWS_CA_BUNDLE"):
        read(bucket_at(server.endpoint.replace("127.0.0.1", "localhost")))


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (403, "RequestTimeTooSkewed", AccessDenied, "clock"),
        (404, "NoSuchBucket", AccessDenied, "create the bucket"),
        (403, "SignatureDoesNotMatch", AccessDenied, "secret key"),
        (400, "AuthorizationHeaderMalformed", AccessDenied, "region"),
        (403, "QuotaExceeded", TierFull, "quota"),
        (507, "", TierFull, "quota"),
        (400, "ExpiredToken", AccessDenied, "renew"),
        (403, "AccessDenied", AccessDenied, "s3:PutObject"),
        (503, "SlowDown", BucketThrottled, "SlowDown"),
        (500, "InternalError", TierUnavailable, "500"),
        (404, "", BadReply, "404"),
    ],
)
def test_errors_say_what_to_do(status: int, code: str, kind: type[KvTierError], advice: str) -> None:
    error = error_of("PUT key", status, code, "the server's words", "7")
    assert isinstance(error, kind)
    assert advice in str(error)
    assert getattr(error, "retry_after", 7) == 7


def test_retry_after() -> None:
    assert retry_after(None) is None
    assert retry_after("nonsense") is None
    assert retry_after("nan") is None
    assert retry_after("3") == 3
    assert retry_after("-3") == 0
    assert retry_after("999999") == 300
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_error_documents() -> None:
    assert read_error(b"<?xml?><Error><Code>A.b</Code><Message>m n</Message></Error>") == ("A.b", "m n")
    assert read_error(b"<html><Code>A</Code></html>") == ("", "")
    assert read_error(b"\xff\x00") == ("", "")


def test_expired_credentials_are_looked_up_anew(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_TEST_KEY", "old")

    def answer(head: str) -> bytes:
        if "Credential=old/" in head:
            monkeypatch.setenv("KVTIER_TEST_KEY", "new")
            return reply(400, b"<Error><Code>ExpiredToken</Code></Error>")
        return serving(head)

    server = serve(answer)
    bucket = bucket_at(server.endpoint)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    assert len(server.requests) == 4
