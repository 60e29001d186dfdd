"""Calls that block (name services, sources of credentials), made beside the threads that serve requests."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import TypeVar

from kvtier._workers import Workers
from kvtier.errors import TierUnavailable
from kvtier.tiers.s3.bucket import BucketTimeout
from kvtier.tiers.s3.waiting import wait_for

T = TypeVar("T")


class Aside:
    """Threads for calls that block for as long as they please. Thread-safe."""

    def __init__(self, name: str, threads: int):
        """Prepare; threads start when they are needed.

        Args:
            name: The threads are called `kvtier-<name>`.
            threads: Calls under way at once; more of them wait.
        """
        self._workers = Workers(name, threads)

    def begin(self, call: Callable[[], T]) -> Future[T]:
        """Make a call that several may wait for by `outcome`."""
        return self._workers.submit(call)

    async def call(self, call: Callable[[], T], seconds: float, what: str) -> T:
        """Make a call and wait for it as `outcome` does; one that has not begun by then is dropped."""
        future = self.begin(call)
        try:
            return await outcome(future, seconds, what)
        finally:
            future.cancel()

    def close(self) -> None:
        """Make no more calls."""
        self._workers.close(cancel=True)


async def outcome(future: Future[T], seconds: float, what: str) -> T:
    """Wait for a call without holding up this thread's other requests.

    Args:
        future: The call.
        seconds: How long to wait at most.
        what: Names it in messages: "the name service".

    Raises:
        BucketTimeout: It takes longer.
        TierUnavailable: It is not made any more, or there are no descriptors left.
        BaseException: Whatever the call raises.
    """
    if not future.done():
        try:
            bell = _Bell()
        except OSError as error:
            raise TierUnavailable(f"{what} cannot be waited for: {error}") from error
        try:
            future.add_done_callback(lambda _: bell.ring())
            await wait_for([(bell.descriptor, select.POLLIN)], seconds)
        finally:
            bell.close()
    if not future.done():
        raise BucketTimeout(f"{what} did not answer within {seconds:.3g} s")
    try:
        return future.result()
    except CancelledError:
        raise TierUnavailable(f"{what} is not asked any more: the tier is being closed") from None


class _Bell:
    """A descriptor that becomes readable once somebody rings, unless it is closed by then."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    def ring(self) -> None:
        # Once it is closed, the number may be that of another one's socket.
        with self._lock:
            if not self._closed:
                os.eventfd_write(self.descriptor, 1)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self.descriptor)
