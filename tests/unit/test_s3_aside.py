"""What blocks (names, credentials, a listing that tells why) holds up only the request that needs it."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from kvtier._counters import Counters
from kvtier.errors import AccessDenied, TierUnavailable
from kvtier.tiers.s3 import http_bucket
from kvtier.tiers.s3.aside import Aside
from kvtier.tiers.s3.bucket import BucketTimeout
from kvtier.tiers.s3.http_bucket import HttpBucket
from kvtier.tiers.s3.http_connect import Connector
from kvtier.tiers.s3.lanes import Lanes
from kvtier.tiers.s3.waiting import run, unless, wait_for
from tests.http_support import DATA, Serve, bucket_at, read, reply, serve, serving

__all__ = ["serve"]

PATIENCE = 60.0


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What hangs in a test goes on at its end."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def lanes() -> Iterator[Lanes]:
    """One thread for all reads."""
    made = Lanes("test", 1, 8)
    yield made
    made.close()


def begin(lanes: Lanes, bucket: HttpBucket, length: int = 1000) -> tuple[Future[None], bytearray]:
    into = bytearray(length)
    parts = iter([memoryview(into)])
    return lanes.submit(lambda: bucket.fetch_parts("some key/!x", 100, length, parts)), into


def goes_on(lanes: Lanes, bucket: HttpBucket) -> None:
    done, into = begin(lanes, bucket)
    done.result(PATIENCE)
    assert into == DATA[100:1100]


def test_a_name_service_that_hangs(
    serve: Serve, lanes: Lanes, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, resolve, asked = serve(serving), socket.getaddrinfo, threading.Event()

    def look_up(host: str, *more: Any, flags: int = 0, **named: Any) -> Any:
        if host == "slow.test" and not flags & socket.AI_NUMERICHOST:
            asked.set()
            assert gate.wait(PATIENCE)
            host = "127.0.0.1"
        return resolve(host, *more, flags=flags, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    slow = bucket_at(f"http://slow.test:{server.port}", connect_timeout=0.5, path_style=True)
    waiting, _ = begin(lanes, slow)
    assert asked.wait(PATIENCE)
    goes_on(lanes, bucket_at(server.endpoint))
    with pytest.raises(BucketTimeout, match="asked for slow"):
        waiting.result(PATIENCE)
    gate.set()
    patient = bucket_at(f"http://slow.test:{server.port}", path_style=True)
    goes_on(lanes, patient)


def test_a_source_of_credentials_that_hangs(
    serve: Serve, lanes: Lanes, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, asked = serve(serving), threading.Event()
    open_session = http_bucket.open_session

    def hang(config: Any) -> Any:
        asked.set()
        assert gate.wait(PATIENCE)
        return open_session(config)

    fine = bucket_at(server.endpoint)
    assert read(fine) == DATA[100:50_100]
    monkeypatch.setattr(http_bucket, "open_session", hang)
    hanging = bucket_at(server.endpoint, read_timeout=0.5)
    waiting, _ = begin(lanes, hanging)
    assert asked.wait(PATIENCE)
    goes_on(lanes, fine)
    with pytest.raises(BucketTimeout, match="credentials"):
        waiting.result(PATIENCE)
    gate.set()
    goes_on(lanes, bucket_at(server.endpoint))


def test_a_listing_after_a_refusal_that_hangs(serve: Serve, lanes: Lanes, gate: threading.Event) -> None:
    listed = threading.Event()

    def refuse(head: str) -> bytes:
        if "list-type" in head:
            listed.set()
            assert gate.wait(PATIENCE)
            return reply(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        return reply(403, b"<Error><Code>AccessDenied</Code></Error>")

    refusing = serve(refuse)
    refused, _ = begin(lanes, bucket_at(refusing.endpoint, connect_timeout=0.5, read_timeout=0.5))
    assert listed.wait(PATIENCE)
    goes_on(lanes, bucket_at(serve(serving).endpoint))
    # What it means is not told in time, so it means what it says.
    with pytest.raises(AccessDenied):
        refused.result(PATIENCE)


def test_a_second_request_that_does_not_come_about_does_not_hold_up_the_first(
    serve: Serve, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters, connecting = Counters(), threading.Event()

    def answer(head: str) -> bytes:
        if connecting.is_set() or not counters.snapshot().get("get_requests", 0) > 1:
            return serving(head)
        assert connecting.wait(PATIENCE)
        return serving(head)

    bucket = bucket_at(serve(answer).endpoint, counters)
    assert read(bucket) == DATA[100:50_100]

    async def never(*_: object) -> None:
        connecting.set()
        await wait_for((), 3600.0)

    monkeypatch.setattr(Connector, "connect", never)
    hedges = bucket._exchange.hedges
    monkeypatch.setattr(hedges, "delay", lambda: 0.01)
    monkeypatch.setattr(hedges, "take", lambda: True)
    assert read(bucket) == DATA[100:50_100]
    assert connecting.is_set()
    assert counters.snapshot()["hedged_requests"] == 1
    assert "hedges_won" not in counters.snapshot()


def test_giving_up_when_something_else_happens() -> None:
    near, far = socket.socketpair()
    ended: list[str] = []

    async def endless() -> None:
        try:
            while True:
                await wait_for((), 0.01)
        finally:
            ended.append("cleaned up")

    async def quick() -> str:
        await wait_for((), 0.0)
        return "result"

    async def tried(request: Callable[[], Any]) -> Any:
        return await unless(request(), [(near.fileno(), select.POLLIN)])

    assert run(tried(quick)) == "result"
    threading.Timer(0.05, far.send, (b"x",)).start()
    assert run(tried(endless)) is None
    assert ended == ["cleaned up"]
    near.close()
    far.close()


def test_addresses_that_do_not_answer_leave_time_for_the_next(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, resolve = serve(serving), socket.getaddrinfo
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = full.getsockname()[1]
    # Once nobody accepts and the queue is full, the kernel leaves connections unanswered.
    crowd = [socket.socket() for _ in range(4)]
    for each in crowd:
        each.setblocking(False)
        each.connect_ex(("127.0.0.1", port))

    def look_up(host: str, *more: Any, **named: Any) -> Any:
        [entry] = resolve("127.0.0.1", *more, **named)
        return [(*entry[:4], ("127.0.0.1", port)), (*entry[:4], ("127.0.0.1", port)), entry]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert read(bucket_at(server.endpoint, connect_timeout=3.0)) == DATA[100:50_100]
    for each in (*crowd, full):
        each.close()


@pytest.mark.parametrize("host", ["a" * 64 + ".test", "a..test"])
def test_names_that_are_none(serve: Serve, host: str) -> None:
    moved = reply(307, Location=f"http://{host}/bucket/some%20key/!x")
    with pytest.raises(TierUnavailable, match="check the endpoint"):
        read(bucket_at(serve(lambda head: moved).endpoint))


def test_calls_end_with_what_they_return_or_raise_and_late_ones_are_dropped(gate: threading.Event) -> None:
    aside, made = Aside("test-aside", 1), []

    def fail() -> None:
        raise ValueError("mine")

    assert run(aside.call(lambda: 7, PATIENCE, "it")) == 7
    with pytest.raises(ValueError, match="mine"):
        run(aside.call(fail, PATIENCE, "it"))
    hanging = aside.begin(lambda: gate.wait(PATIENCE))
    with pytest.raises(BucketTimeout, match="it did not answer"):
        run(aside.call(lambda: made.append(1), 0.01, "it"))
    gate.set()
    assert hanging.result(PATIENCE)
    assert run(aside.call(lambda: 8, PATIENCE, "it")) == 8
    assert made == [], "nobody waited for it any more"
    aside.close()
    with pytest.raises(TierUnavailable):
        run(aside.call(lambda: 9, PATIENCE, "it"))
