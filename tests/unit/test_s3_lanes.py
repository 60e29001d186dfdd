"""Requests that take turns: what they wait for, how many are under way, and how they end."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from kvtier.tiers.s3.lanes import Lanes
from kvtier.tiers.s3.waiting import Request, run, wait_for

PATIENCE = 30.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    with near, far:
        yield near, far


async def received(near: socket.socket) -> bytes:
    assert await wait_for([(near.fileno(), select.POLLIN)], PATIENCE) == [near.fileno()]
    return near.recv(100)


def test_a_coroutine_runs_in_the_thread_that_asks(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    far.send(b"here")
    assert run(received(near)) == b"here"


def test_a_wait_ends_by_itself(pair: tuple[socket.socket, socket.socket]) -> None:
    near, _ = pair

    async def late() -> list[int]:
        return await wait_for([(near.fileno(), select.POLLIN)], 0.01)

    assert run(late()) == []
    lanes, seen = Lanes("test", 1, 4), []

    async def late_too() -> None:
        seen.append(await late())

    lanes.submit(late_too).result(PATIENCE)
    assert seen == [[]]
    lanes.close()


def test_one_thread_looks_after_many_requests_in_any_order() -> None:
    lanes, got = Lanes("test", 1, 20), []
    pairs = [socket.socketpair() for _ in range(20)]

    async def receive(number: int) -> None:
        got.append((number, await received(pairs[number][0]), threading.current_thread().name))

    futures = [lanes.submit(lambda number=number: receive(number)) for number in range(20)]
    for number in reversed(range(20)):
        pairs[number][1].send(b"%d" % number)
        futures[number].result(PATIENCE)
    assert [(number, data) for number, data, _ in got] == [(n, b"%d" % n) for n in reversed(range(20))]
    assert {name for _, _, name in got} == {"kvtier-test"}
    lanes.close()
    for near, far in pairs:
        near.close()
        far.close()


@pytest.mark.parametrize(("threads", "limit"), [(1, 1), (1, 3), (2, 3), (3, 2), (4, 4)])
def test_no_more_are_under_way_than_the_limit_and_all_come_to_their_end(threads: int, limit: int) -> None:
    lanes, lock = Lanes("test", threads, limit), threading.Lock()
    under_way, most = 0, 0

    async def rest() -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        await wait_for((), 0.005)
        with lock:
            under_way -= 1

    for future in [lanes.submit(rest) for _ in range(50)]:
        future.result(PATIENCE)
    assert (under_way, most) == (0, limit)
    lanes.close()


def test_submitters_in_many_threads_are_all_served() -> None:
    lanes, lock, done = Lanes("test", 3, 5), threading.Lock(), 0

    async def count() -> None:
        nonlocal done
        await wait_for((), 0.0)
        with lock:
            done += 1

    def submit() -> None:
        for _ in range(100):
            lanes.submit(count).result(PATIENCE)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == 800
    lanes.close()


def test_a_failure_belongs_to_its_request_alone() -> None:
    lanes = Lanes("test", 1, 4)

    async def fail(early: bool) -> None:
        if not early:
            await wait_for((), 0.0)
        raise ValueError("mine")

    async def work() -> None:
        await wait_for((), 0.01)

    futures = [lanes.submit(lambda: fail(True)), lanes.submit(lambda: fail(False)), lanes.submit(work)]
    assert [type(future.exception(PATIENCE)) for future in futures] == [ValueError, ValueError, type(None)]
    lanes.close()


def test_a_closed_socket_harms_nobody_else(pair: tuple[socket.socket, socket.socket]) -> None:
    near, far = pair
    lanes, got = Lanes("test", 1, 4), []

    async def receive() -> None:
        got.append(await received(near))

    async def stumble() -> None:
        await wait_for([(-1, select.POLLIN)], PATIENCE)

    good, bad = lanes.submit(receive), lanes.submit(stumble)
    assert isinstance(bad.exception(PATIENCE), ValueError)
    far.send(b"still here")
    good.result(PATIENCE)
    assert got == [b"still here"]
    lanes.close()


def test_what_has_not_begun_is_dropped_at_the_end_and_what_has_goes_on(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    near, far = pair
    lanes, begun, data = Lanes("test", 1, 1), threading.Event(), []

    async def first() -> None:
        begun.set()
        data.append(await received(near))

    under_way, waiting = lanes.submit(first), lanes.submit(first)
    assert begun.wait(PATIENCE)
    lanes.close()
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    assert lanes.submit(first).cancelled()
    far.send(b"late")
    under_way.result(PATIENCE)
    assert data == [b"late"]


def test_threads_end_with_their_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.tiers.s3.lanes._IDLE_SECONDS", 0.01)
    lanes = Lanes("test-end", 2, 2)

    async def work() -> None:
        await wait_for((), 0.0)

    for _ in range(3):
        lanes.submit(work).result(PATIENCE)
        end = time.monotonic() + PATIENCE
        while any(thread.name == "kvtier-test-end" for thread in threading.enumerate()):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_where_no_thread_can_be_started_requests_are_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = Lanes("test", 2, 2)

    def fail(*_: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    async def work() -> None:
        await wait_for((), 0.0)

    with monkeypatch.context() as patch:
        patch.setattr("kvtier.tiers.s3.lanes.os.eventfd", fail)
        assert lanes.submit(work).cancelled()
    lanes.submit(work).result(PATIENCE)
    lanes.close()


def test_a_request_that_cannot_be_made_harms_nobody_else() -> None:
    lanes = Lanes("test", 1, 1)

    def fail() -> Request[None]:
        raise MemoryError

    async def work() -> None:
        await wait_for((), 0.0)

    bad, good = lanes.submit(fail), lanes.submit(work)
    assert isinstance(bad.exception(PATIENCE), MemoryError)
    good.result(PATIENCE)
    lanes.close()


def test_what_a_thread_cannot_go_on_with_fails_and_the_rest_goes_to_another(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[socket.socket, socket.socket]
) -> None:
    near, _ = pair
    lanes, begun, seen = Lanes("test", 1, 2), threading.Event(), []
    poll = select.poll

    class Broken:
        """A wait that fails as soon as a request waits for a socket of its own."""

        def __init__(self) -> None:
            self._poll, self._sockets = poll(), 0

        def register(self, descriptor: int, events: int) -> None:
            self._sockets += 1
            self._poll.register(descriptor, events)

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            if self._sockets > 1:
                raise OSError(errno.ENOMEM, "no memory")
            return self._poll.poll(milliseconds)

    async def cleans_up() -> None:
        try:
            begun.set()
            await received(near)
        except Exception as error:
            seen.append(error)

    async def stubborn() -> None:
        with contextlib.suppress(Exception):
            await received(near)
        await received(near)

    async def work() -> None:
        await wait_for((), 0.0)

    monkeypatch.setattr("kvtier.tiers.s3.lanes.select.poll", Broken)
    # The first is under way, the others wait in the queue when the thread ends.
    futures = [lanes.submit(each) for each in (cleans_up, stubborn, work, work)]
    futures[0].result(PATIENCE)
    assert [type(error) for error in seen] == [RuntimeError]
    assert isinstance(futures[1].exception(PATIENCE), RuntimeError)
    for future in futures[2:]:
        future.result(PATIENCE)
    lanes.submit(work).result(PATIENCE)
    lanes.close()
