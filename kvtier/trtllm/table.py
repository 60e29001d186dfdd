"""The leader's requests: remembered while they are heard of, forgotten when they fall silent."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from kvtier.trtllm.request import RequestState

SILENCE_SECONDS = 600.0
"""Cancelled and failed requests are never announced: after this long without a sign of life one is gone."""

MAX_REQUESTS = 4096
"""Bound on what is remembered; beyond it the longest silent go first."""


class RequestTable:
    """Request states by id, longest silent first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: OrderedDict[int, RequestState] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def hear(self, request_id: int) -> RequestState | None:
        """Return a request's state and note a sign of life; None if it is not known."""
        state = self._states.get(request_id)
        if state is not None:
            state.seen = self._clock()
            self._states.move_to_end(request_id)
        return state

    def add(self, request_id: int, state: RequestState) -> None:
        """Remember a request, in place of what was known under its id."""
        state.seen = self._clock()
        self._states[request_id] = state
        self._states.move_to_end(request_id)

    def pop(self, request_id: int) -> RequestState | None:
        """Forget a request and return its state."""
        return self._states.pop(request_id, None)

    def promised(self) -> bool:
        """Say whether any request has a promise open."""
        return any(state.promise for state in self._states.values())

    def pop_silent(self) -> Iterator[RequestState]:
        """Forget, one by one, the requests that have been silent for too long or are too many."""
        oldest = self._clock() - SILENCE_SECONDS
        while self._states:
            request_id, state = next(iter(self._states.items()))
            if state.seen >= oldest and len(self._states) <= MAX_REQUESTS:
                return
            del self._states[request_id]
            yield state
