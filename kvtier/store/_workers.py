"""Daemon threads that take jobs from a queue."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from kvtier._logging import log_once

_log = logging.getLogger(__name__)

Job = Callable[[], None]


class Workers:
    """A few daemon threads and one queue.

    Unlike a `ThreadPoolExecutor`, the interpreter does not wait for them at exit: a job that hangs on a dead
    disk or bucket must not keep an engine's process alive.
    """

    def __init__(self, name: str, count: int) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"kvtier-{name}-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job. An exception out of it is a defect: it is logged, and the thread goes on."""
        self._jobs.put(job)

    def close(self, timeout: float) -> None:
        """Let the threads end after the jobs queued so far, and wait up to `timeout` seconds for them."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout / len(self._threads))

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # noqa: BLE001 - the thread serves others too
                log_once(_log, type(error).__name__, "a background job failed: %r", error)
