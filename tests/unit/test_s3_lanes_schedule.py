"""Threads that look after requests, in seeded schedules: a clock, sockets and a scheduler that are made up.

One thread runs at a time, and the scheduler chooses which: at every lock and every wait of the real code.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.tiers.s3 import lanes as lanes_module
from kvtier.tiers.s3 import waiting as waiting_module
from kvtier.tiers.s3.lanes import Lanes
from kvtier.tiers.s3.waiting import wait_for

SEEDS = 150
POLLIN = 1
BATON_SECONDS = 60.0
MOST_WORK = 0.5
"""Seconds on the made-up clock that a request works between two waits."""


class Actor:
    """A thread under the scheduler.

    Attributes:
        sockets: What it polls; empty unless it does.
        until: When it goes on in any case.
        polls: Whether it waits for sockets, and not for the end of its work or its turn.
    """

    def __init__(self) -> None:
        self.baton = threading.Semaphore(0)
        self.sockets: list[int] = []
        self.until = 0.0
        self.polls = False
        self.ended = False


class World:
    """Clock, sockets and scheduler."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"lanes {seed}")
        self.now = 0.0
        self.readable: set[int] = set()
        self.events: list[tuple[float, Callable[[], None]]] = []
        self.actors: list[Actor] = []
        self.check: Callable[[], None] = lambda: None
        self._local = threading.local()
        self._back = threading.Semaphore(0)
        self._next_socket = 0

    def socket(self) -> int:
        self._next_socket += 1
        return self._next_socket

    def at(self, moment: float, event: Callable[[], None]) -> None:
        self.events.append((moment, event))

    def start(self, target: Callable[[], None]) -> None:
        actor = Actor()
        self.actors.append(actor)

        def body() -> None:
            self._local.actor = actor
            assert actor.baton.acquire(timeout=BATON_SECONDS)
            try:
                target()
            finally:
                actor.ended = True
                self._back.release()

        threading.Thread(target=body, daemon=True).start()

    def pause(self, until: float, sockets: list[int] | None = None) -> None:
        """Let others run; the scheduler itself goes on."""
        actor = getattr(self._local, "actor", None)
        if actor is None:
            return
        actor.until, actor.sockets, actor.polls = until, sockets or [], sockets is not None
        self._back.release()
        assert actor.baton.acquire(timeout=BATON_SECONDS)
        actor.polls = False

    def run(self, done: Callable[[], bool]) -> None:
        """Run threads and events in any order that the clock allows, until `done`."""
        while not done():
            self.actors = [actor for actor in self.actors if not actor.ended]
            free = [
                actor
                for actor in self.actors
                if actor.until <= self.now or self.readable.intersection(actor.sockets)
            ]
            due = [entry for entry in self.events if entry[0] <= self.now]
            choices = len(free) + len(due)
            if not choices:
                self.check()
                moments = [actor.until for actor in self.actors] + [moment for moment, _ in self.events]
                assert moments, "nothing will ever happen again"
                self.now = min(moments)
                continue
            choice = self.rng.randrange(choices)
            if choice < len(due):
                self.events.remove(due[choice])
                due[choice][1]()
            else:
                free[choice - len(due)].baton.release()
                assert self._back.acquire(timeout=BATON_SECONDS)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    """Make worlds in which lanes live."""
    current: list[World] = []

    class Lock:
        def __enter__(self) -> None:
            current[0].pause(current[0].now)

        def __exit__(self, *error: object) -> None:
            pass

    class Thread:
        def __init__(self, target: Callable[..., None], args: tuple[Any, ...], **_: object) -> None:
            self._target = lambda: target(*args)

        def start(self) -> None:
            current[0].start(self._target)

    class Poll:
        def __init__(self) -> None:
            self._sockets: list[int] = []

        def register(self, descriptor: int, events: int) -> None:
            self._sockets.append(descriptor)

        def poll(self, milliseconds: float) -> list[tuple[int, int]]:
            world = current[0]
            world.pause(world.now + milliseconds / 1000, self._sockets)
            return [(number, POLLIN) for number in self._sockets if number in world.readable]

    clock = SimpleNamespace(monotonic=lambda: current[0].now)
    monkeypatch.setattr(lanes_module, "time", clock)
    monkeypatch.setattr(waiting_module, "time", clock)
    monkeypatch.setattr(lanes_module, "threading", SimpleNamespace(Lock=Lock, Thread=Thread))
    monkeypatch.setattr(lanes_module, "select", SimpleNamespace(poll=Poll, POLLIN=POLLIN))
    eventfds = SimpleNamespace(
        EFD_NONBLOCK=0,
        EFD_CLOEXEC=0,
        eventfd=lambda *_: current[0].socket(),
        eventfd_write=lambda number, _: current[0].readable.add(number),
        eventfd_read=lambda number: current[0].readable.discard(number),
        close=lambda number: current[0].readable.discard(number),
    )
    monkeypatch.setattr(lanes_module, "os", eventfds)

    def make(seed: int) -> World:
        current[:] = [World(seed)]
        return current[0]

    return make


class Load:
    """Requests that wait, work, fail and hang, and what is known about each."""

    def __init__(self, world: World, lanes: Lanes, limit: int) -> None:
        self.futures: list[Future[None]] = []
        self.latest = 0.0
        self._world, self._lanes, self._limit = world, lanes, limit
        self._under_way = 0

    def submit(self) -> None:
        self.futures.append(self._lanes.submit(self._request))

    def overdue(self, until: float) -> float:
        """Return by how much a wait may outlast its end: others of the same thread are at work."""
        return until + MOST_WORK * (self._limit + 1)

    async def _request(self) -> None:
        world, rng = self._world, self._world.rng
        self._under_way += 1
        assert self._under_way <= self._limit
        try:
            for _ in range(rng.randrange(5)):
                socket, seconds = world.socket(), rng.choice([0.0, 0.1, 1.0, 5.0])
                if rng.random() < 0.7:
                    world.at(
                        world.now + rng.choice([0.0, 0.05, 0.9, 2.0]), lambda s=socket: world.readable.add(s)
                    )
                until = world.now + seconds
                ready = await wait_for([(socket, POLLIN)] if rng.random() < 0.9 else (), seconds)
                # By what it waited for or by its end, and not much later.
                assert ready == [socket] or (not ready and world.now >= until)
                assert world.now <= self.overdue(until)
                world.readable.discard(socket)
                world.pause(world.now + rng.choice([0.0, 0.01, MOST_WORK]))
                if rng.random() < 0.05:
                    raise ValueError("a failure of this request")
        finally:
            self._under_way -= 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nobody_is_forgotten_and_nobody_sleeps_beside_a_queue(
    threads: int, worlds: Callable[[int], World]
) -> None:
    for seed in range(SEEDS):
        try:
            follow(worlds(seed), threads)
        except BaseException:
            print(f"seed {seed}")
            raise


def follow(world: World, threads: int) -> None:
    limit, count = world.rng.randrange(1, 9), world.rng.randrange(1, 40)
    lanes = Lanes("test", threads, limit)
    load = Load(world, lanes, limit)

    def check() -> None:
        sleeps = any(actor.polls for actor in world.actors)
        assert not (lanes._queue and lanes._under_way < limit and sleeps), "a request waits beside a sleeper"

    world.check = check
    moment = 0.0
    for _ in range(count):
        # Now and then all threads have ended when the next one comes.
        moment += world.rng.choice([0.0, 0.0, 0.02, 0.7, 200.0 if world.rng.random() < 0.1 else 0.0])
        world.at(moment, load.submit)
    closes = world.rng.random() < 0.3
    if closes:
        world.at(world.rng.uniform(0, moment), lanes.close)
    world.run(lambda: len(load.futures) == count and all(future.done() for future in load.futures))
    for future in load.futures:
        if not future.cancelled():
            assert isinstance(future.exception(), ValueError | None), future.exception()
    assert closes or not any(future.cancelled() for future in load.futures)
    lanes.close()
    world.run(lambda: all(actor.ended for actor in world.actors))
    assert lanes._under_way == 0
    assert lanes._lanes == []
