"""The leader's requests: remembered while they are heard of, forgotten when they fall silent."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from kvtier.trtllm.request import RequestState

SILENCE_SECONDS = 600.0
"""Cancelled and failed requests are never announced: after this long without a sign of life one is gone."""

MAX_REQUESTS = 4096
"""Bound on what is remembered; beyond it those go first that were not heard of for long."""


class RequestTable:
    """Request states by id.

    In order of the last look at them by `pop_silent`: what was heard of since has its turn again.

    Attributes:
        clock: Monotonic seconds.
        states: The states. Who takes one out of here notes a sign of life in its `seen`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.states: OrderedDict[int, RequestState] = OrderedDict()

    def __len__(self) -> int:
        return len(self.states)

    def hear(self, request_id: int) -> RequestState | None:
        """Return a request's state and note a sign of life; None if it is not known."""
        state = self.states.get(request_id)
        if state is not None:
            state.seen = self.clock()
        return state

    def add(self, request_id: int, state: RequestState) -> None:
        """Remember a request, in place of what was known under its id."""
        state.seen = state.looked_at = self.clock()
        self.states[request_id] = state
        self.states.move_to_end(request_id)

    def pop(self, request_id: int) -> RequestState | None:
        """Forget a request and return its state."""
        return self.states.pop(request_id, None)

    def promised(self) -> bool:
        """Say whether any request has a promise open."""
        return any(state.promise for state in self.states.values())

    def pop_silent(self) -> Iterator[RequestState]:
        """Forget, one by one, the requests that have been silent for too long or are too many."""
        now = self.clock()
        oldest = now - SILENCE_SECONDS
        while self.states:
            request_id, state = next(iter(self.states.items()))
            too_many = len(self.states) > MAX_REQUESTS
            if state.looked_at >= oldest and not too_many:
                return
            if state.seen > state.looked_at and (state.seen >= oldest or too_many):
                state.looked_at = now
                self.states.move_to_end(request_id)
                continue
            del self.states[request_id]
            yield state
