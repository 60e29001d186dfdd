"""Our own HTTP client: framing, kept connections, and replies of servers that are none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier._counters import Counters
from kvtier.tiers.s3.bucket import BadReply, ConnectionLost, ObjectMissing
from kvtier.tiers.s3.http_wire import parse_head, write_head
from tests.http_support import (
    DATA,
    Serve,
    asked_range,
    bucket_at,
    chunked,
    read,
    reply,
    serve,
    serving,
)

__all__ = ["serve"]


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


def test_blanks_take_no_longer_than_letters() -> None:
    """A pattern that tries all ways to share out 30,000 blanks takes seconds, and all threads wait."""

    def seconds(filling: bytes) -> float:
        start = time.thread_time()
        for _ in range(5):
            assert parse_head(b"HTTP/1.1 200 OK\r\na: x" + filling * 30_000 + b"y ").headers["a"][-1] == "y"
        return time.thread_time() - start

    letters = min(seconds(b"z") for _ in range(3))
    assert seconds(b" ") < 1000 * letters


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
