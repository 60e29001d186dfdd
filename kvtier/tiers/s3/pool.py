"""A pool of daemon threads: a request that hangs must not keep the engine's process alive."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_IDLE_SECONDS = 60.0


class DaemonPool:
    """Runs calls first come, first served, on up to `limit` threads.

    Threads start when they are needed and end after a minute without work, and their buffers with them.

    `concurrent.futures.ThreadPoolExecutor` would do, but the interpreter waits for its threads at exit.
    """

    def __init__(self, name: str, limit: int):
        """Make a pool; its threads are called `name`."""
        self._name = name
        self._limit = limit
        self._wake = threading.Condition()
        self._jobs: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Queue a call. On a closed pool the future comes back cancelled.

        At the interpreter's end no thread can be started any more: then the call is made here and now.
        """
        future: Future[T] = Future()
        with self._wake:
            if self._closed:
                future.cancel()
                return future
            if self._idle <= len(self._jobs) and self._threads < self._limit:
                self._start_thread()
            if self._threads:
                self._jobs.append((future, call))
                self._wake.notify()
                return future
        _complete(future, call)
        return future

    def close(self) -> None:
        """Cancel what has not begun and let the threads end; what has begun is not waited for."""
        with self._wake:
            self._closed = True
            for future, _ in self._jobs:
                future.cancel()
            self._jobs.clear()
            self._wake.notify_all()

    def _start_thread(self) -> None:
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:
            return
        self._threads += 1

    def _run(self) -> None:
        while True:
            with self._wake:
                self._idle += 1
                self._wake.wait_for(lambda: self._jobs or self._closed, _IDLE_SECONDS)
                self._idle -= 1
                if not self._jobs:
                    self._threads -= 1
                    return
                future, call = self._jobs.popleft()
            _complete(future, call)
            # Not kept alive by a thread that waits for work.
            del future, call


def _complete(future: Future[T], call: Callable[[], T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever holds the future
            future.set_exception(error)
