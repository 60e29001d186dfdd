"""Requests that take turns in a thread: coroutines that say what they wait for, and what runs them.

A thread for each request costs more the more of them there are: each wakes when its bytes come, and then
waits for the GIL. A few threads that look after many requests each have nobody to wait for.
"""

from __future__ import annotations

import select
import time
import types
from collections.abc import Coroutine, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Wait(NamedTuple):
    """What a coroutine waits for.

    Attributes:
        sockets: Descriptors, and the events of `select.poll` that end the wait.
        until: When it ends in any case, on `time.monotonic`'s clock.
    """

    sockets: Sequence[tuple[int, int]]
    until: float


Request = Coroutine[Wait, list[int], T]
"""A coroutine that waits by `wait_for` alone."""


@types.coroutine
def wait_for(sockets: Sequence[tuple[int, int]], seconds: float) -> Generator[Wait, list[int], list[int]]:
    """Wait until something happens on one of `sockets`, at most `seconds`; return the descriptors.

    Raises:
        ValueError: One of them is closed: that must not reach those who wait beside this request.
    """
    if any(descriptor < 0 for descriptor, _ in sockets):
        raise ValueError("a closed socket cannot be waited for")
    return (yield Wait(sockets, time.monotonic() + seconds))


@types.coroutine
def unless(request: Request[T], sockets: Sequence[tuple[int, int]]) -> Generator[Wait, list[int], T | None]:
    """Run a coroutine; as soon as something happens on `sockets`, give it up and return None."""
    mine = {descriptor for descriptor, _ in sockets}
    ready: list[int] = None  # type: ignore[assignment]
    while True:
        try:
            wait = request.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result
        ready = yield Wait((*wait.sockets, *sockets), wait.until)
        if mine.intersection(ready):
            request.close()
            return None


def run(request: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end in this thread, which waits where it waits."""
    ready: list[int] | None = None
    while True:
        try:
            wait: Wait = request.send(ready)
        except StopIteration as end:
            result: T = end.value
            return result
        poll = select.poll()
        for descriptor, events in wait.sockets:
            poll.register(descriptor, events)
        ready = [number for number, _ in poll.poll(milliseconds(wait.until))]


def milliseconds(until: float) -> float:
    """Return what is left until then, for `select.poll`."""
    return max(0.0, (until - time.monotonic()) * 1000)
