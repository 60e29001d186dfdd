"""Threads that look after many requests each."""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from kvtier._logging import log_once
from kvtier.tiers.s3.waiting import Request, Wait, milliseconds

_logger = logging.getLogger(__name__)

_IDLE_SECONDS = 60.0


class _Job(NamedTuple):
    future: Future[None]
    begin: Callable[[], Request[None]]


class _Turn(NamedTuple):
    """A request that is under way, and what it waits for."""

    job: _Job
    request: Request[None]
    wait: Wait


class _Lane:
    """What one thread looks after.

    Attributes:
        turns: Its requests; no other thread touches them.
        sleeps: Whether it waits, and begins no request before it is woken; guarded by the lock of `Lanes`.
    """

    def __init__(self) -> None:
        self.turns: dict[int, _Turn] = {}
        self.sleeps = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def wake(self) -> None:
        """End the thread's wait."""
        os.eventfd_write(self._wake, 1)

    def wait(self, until: float) -> set[int]:
        """Wait for what any request waits for, or to be woken; return the descriptors that are ready."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for turn in self.turns.values():
            until = min(until, turn.wait.until)
            for descriptor, events in turn.wait.sockets:
                poll.register(descriptor, events)
        ready = {number for number, _ in poll.poll(milliseconds(until))}
        if self._wake in ready:
            os.eventfd_read(self._wake)
        return ready

    def due(self, ready: set[int]) -> list[tuple[_Turn, list[int]]]:
        """Take out the requests whose wait is over, each with those of its descriptors that are ready."""
        now = time.monotonic()
        due = []
        for number, turn in list(self.turns.items()):
            mine = [descriptor for descriptor, _ in turn.wait.sockets if descriptor in ready]
            if mine or turn.wait.until <= now:
                due.append((self.turns.pop(number), mine))
        return due

    def close(self) -> None:
        """Close what wakes the thread."""
        os.close(self._wake)


class Lanes:
    """Runs requests, first come, first served, on a few daemon threads; each looks after several at once.

    A thread that has bytes to work on begins no further request: so there are as many under way as it takes
    to keep the threads busy, up to the limit, and what arrives is worked on while it is in the cache.

    Threads start when they are needed and end after a minute without work.
    """

    def __init__(self, name: str, threads: int, limit: int) -> None:
        """Prepare; no thread is started yet.

        Args:
            name: The threads are called `kvtier-<name>`.
            threads: How many there are at most.
            limit: Requests under way at most, in all threads together.
        """
        self._name = f"kvtier-{name}"
        self._threads = threads
        self._limit = limit
        self._lock = threading.Lock()
        self._lanes: list[_Lane] = []
        self._queue: deque[_Job] = deque()
        self._under_way = 0
        self._closed = False

    def submit(self, begin: Callable[[], Request[None]]) -> Future[None]:
        """Queue a request, which `begin` makes once it is its turn. Once closed, the future is cancelled."""
        job = _Job(Future(), begin)
        with self._lock:
            if not self._closed and len(self._lanes) < self._threads:
                self._start()
            if self._closed or not self._lanes:
                job.future.cancel()
            else:
                self._queue.append(job)
                self._wake_one()
        return job.future

    def close(self) -> None:
        """Take no more requests and drop those that have not begun; those under way go on."""
        with self._lock:
            self._closed = True
            dropped = list(self._queue)
            self._queue.clear()
            for lane in self._lanes:
                lane.wake()
        for job in dropped:
            job.future.cancel()

    def _wake_one(self) -> None:
        """Have a thread that sleeps look at the queue, if there is any. The lock is held."""
        for lane in self._lanes:
            if lane.sleeps:
                lane.sleeps = False
                lane.wake()
                return

    def _start(self) -> None:
        """Start a thread, unless there are too many or the interpreter ends. The lock is held."""
        try:
            lane = _Lane()
        except OSError as error:
            log_once(_logger, "start", "a thread that reads from the bucket cannot be started: %s", error)
            return
        thread = threading.Thread(target=self._run, args=(lane,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            lane.close()
        else:
            self._lanes.append(lane)

    def _run(self, lane: _Lane) -> None:
        try:
            self._serve(lane)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody must wait for ever for this thread
            self._abandon(lane, error)

    def _serve(self, lane: _Lane) -> None:
        while True:
            may_begin = self._has_room(lane)
            now = time.monotonic()
            ready = lane.wait(now if may_begin else now + _IDLE_SECONDS)
            due = lane.due(ready)
            if due:
                self._keeps_busy(lane)
            for turn, mine in due:
                self._advance(lane, turn.job, turn.request, mine)
            if may_begin and not due:
                self._begin(lane)
            elif not lane.turns and self._leaves(lane, idle=not ready):
                return

    def _has_room(self, lane: _Lane) -> bool:
        """Say whether there is a request to begin; if not, the lane is woken when there is."""
        with self._lock:
            lane.sleeps = not self._queue or self._under_way >= self._limit
            return not lane.sleeps

    def _begin(self, lane: _Lane) -> None:
        with self._lock:
            if not self._queue or self._under_way >= self._limit:
                return
            job = self._queue.popleft()
            self._under_way += 1
            # Somebody else may have time for the next one.
            if self._queue:
                self._wake_one()
        if not job.future.set_running_or_notify_cancel():
            self._end()
            return
        try:
            request = job.begin()
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever holds the future
            job.future.set_exception(error)
            self._end()
        else:
            self._advance(lane, job, request, None)

    def _keeps_busy(self, lane: _Lane) -> None:
        """Note that a thread has its own requests to work on: what it was woken to begin is for others."""
        with self._lock:
            lane.sleeps = False
            if self._queue and self._under_way < self._limit:
                self._wake_one()

    def _advance(self, lane: _Lane, job: _Job, request: Request[None], ready: list[int] | None) -> None:
        """Let a request go on until it waits again or has ended."""
        try:
            wait = request.send(ready)  # type: ignore[arg-type]
        except StopIteration:
            job.future.set_result(None)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever holds the future
            job.future.set_exception(error)
        else:
            lane.turns[id(request)] = _Turn(job, request, wait)
            return
        self._end()

    def _end(self) -> None:
        with self._lock:
            self._under_way -= 1
            if self._queue:
                self._wake_one()

    def _abandon(self, lane: _Lane, error: BaseException) -> None:
        """Fail the requests of a thread that cannot go on, and have another one take the queue over."""
        log_once(_logger, "abandon", "a thread that reads from the bucket ends early: %r", error)
        turns = list(lane.turns.values())
        with self._lock:
            self._lanes.remove(lane)
            self._under_way -= len(turns)
            if self._queue and not self._lanes:
                self._start()
            dropped = [] if self._lanes else list(self._queue)
            for _ in dropped:
                self._queue.popleft()
            self._wake_one()
        lane.close()
        for turn in turns:
            _end_early(turn, error)
        for job in dropped:
            job.future.cancel()

    def _leaves(self, lane: _Lane, idle: bool) -> bool:
        """Let a thread without requests go, if it is not needed."""
        with self._lock:
            if self._queue or not (idle or self._closed):
                return False
            self._lanes.remove(lane)
            lane.close()
            return True


def _end_early(turn: _Turn, error: BaseException) -> None:
    """Have a request fail where it waits, so that it does what it does when it fails."""
    try:
        turn.request.throw(RuntimeError(f"the thread of this request cannot go on: {error!r}"))
        raise RuntimeError("a request waits again although it cannot be gone on with")
    except StopIteration:
        turn.job.future.set_result(None)
    except BaseException as outcome:  # noqa: BLE001 - it belongs to whoever holds the future
        turn.job.future.set_exception(outcome)
