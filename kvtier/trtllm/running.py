"""Which saves may still be reading pages that the coming pass writes to."""

from __future__ import annotations

from typing import Any


class RunningSaves:
    """Numbers the passes, and tells after the saves of which of them a pass must come.

    Saved pages are whole, and nobody writes to a whole page as long as a request holds it. What runs in the
    coming pass still holds its pages. A request that is not in it has ended, was cancelled (which nobody
    tells) or paused, and its pages may be anybody's by now, also of requests that a connector never hears of,
    such as those that fill up a batch for a CUDA graph: page ids prove nothing. So a pass waits for the saves
    of requests that have left the batch, and for no others. How far the copies are, only the GPU knows: it
    does not wait for what is over. With attention windows a request loses pages while it runs: then a pass
    waits for all saves before it.

    Attributes:
        number: Of the present pass.
    """

    def __init__(self) -> None:
        self.number = 0
        self._last: dict[int, int] = {}

    def begin(self, scheduler_output: Any, windows: bool) -> int:
        """Begin a pass, and return the number of the last pass whose saves must come before it.

        Args:
            scheduler_output: The engine's batch.
            windows: Whether any layers have an attention window.
        """
        before, self.number = self.number, self.number + 1
        if not self._last:
            return 0
        # What appears as new has new pages, whatever it had before.
        stay = {data.request_id for data in getattr(scheduler_output, "cached_requests", None) or ()}
        left = [request for request in self._last if request not in stay]
        behind = max([self._last.pop(request) for request in left], default=0)
        return before if windows else behind

    def note(self, request_id: int) -> None:
        """Note that blocks of a request are saved in the present pass."""
        self._last[request_id] = self.number

    def hold(self, request_id: int) -> bool:
        """Say whether saves of a request that ends are probably under way, so that its pages should stay.

        They were ordered in this pass or, where the engine looks at tokens one pass late, in the one before.
        """
        if self._last.get(request_id, -1) < self.number - 1:
            return False
        del self._last[request_id]
        return True
