"""Daemon threads that take calls from a queue."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from kvtier._logging import log_once

_log = logging.getLogger(__name__)

T = TypeVar("T")

_IDLE_SECONDS = 60.0


class Workers:
    """Runs calls first come, first served, on up to `limit` threads.

    Threads start when they are needed and end after a minute without work, and their buffers with them.

    `concurrent.futures.ThreadPoolExecutor` would do, but the interpreter waits for its threads at exit, and
    ends them before anything that is still to be written at exit: a call that hangs on a dead disk or bucket
    must not keep an engine's process alive, and the end of a process is when an engine's store is closed.
    """

    def __init__(self, name: str, limit: int, *, at_end: Callable[[], None] | None = None) -> None:
        """Make the queue; no thread is started yet.

        Args:
            name: The threads are called `kvtier-<name>`.
            limit: How many threads there are at most.
            at_end: Called by each thread before it ends, for what only the thread itself can give back.
        """
        self._name = f"kvtier-{name}"
        self._limit = limit
        self._at_end = at_end
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._ending = False
        self._closed = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call. Once closed, the future comes back cancelled.

        At the interpreter's end no thread can be started any more: then the call is made here and now. Where
        the process may have no more threads for the moment, it waits until one can be started for a later
        call: whoever queues it must not be held up.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._closed:
                future.cancel()
                return future
            if self._idle <= len(self._jobs) and len(self._threads) < self._limit:
                self._start_thread()
            if self._threads or not self._ending:
                self._jobs.append((future, call))
                self._wake.notify()
                return future
        _complete(future, call)
        return future

    def run(self, job: Callable[[], object]) -> None:
        """Queue a call nobody waits for. An exception out of it is a defect: it is logged."""
        self.submit(job).add_done_callback(_log_failure)

    def close(self, timeout: float = 0.0, *, cancel: bool = False) -> None:
        """Take no more calls, let the threads end after those queued so far, and wait for them.

        Args:
            timeout: Seconds to wait at most; what has begun goes on after that.
            cancel: Whether calls that have not begun are dropped.
        """
        deadline = time.monotonic() + timeout
        with self._wake:
            self._closed = True
            dropped = list(self._jobs) if cancel else []
            if cancel:
                self._jobs.clear()
            threads = list(self._threads)
            self._wake.notify_all()
        for future, _ in dropped:
            future.cancel()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._ending = "shutdown" in str(error)
            return
        self._threads.add(thread)

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            _complete(*job)
            # Not kept alive by a thread that waits for work.
            del job
        if self._at_end is not None:
            self._at_end()

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._wake:
            self._idle += 1
            self._wake.wait_for(lambda: self._jobs or self._closed, _IDLE_SECONDS)
            self._idle -= 1
            if self._jobs:
                return self._jobs.popleft()
            self._threads.discard(threading.current_thread())
            return None


def _complete(future: Future[T], call: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever holds the future
            future.set_exception(error)


def _log_failure(future: Future[Any]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log_once(_log, type(error).__name__, "a background job failed: %r", error)
