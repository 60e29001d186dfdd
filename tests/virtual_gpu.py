"""A GPU of the imagination: streams that run when chance lets them, as far as their events allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable

from kvtier.gpu.copies import Addresses, copy_on_host


class VirtualEvent:
    def __init__(self, gpu: VirtualGpu) -> None:
        self._gpu = gpu
        self.passed = False

    def query(self) -> bool:
        self._gpu.run_some()
        return self.passed

    def synchronize(self) -> None:
        while not self.passed:
            self._gpu.run_one()


class VirtualStream:
    def __init__(self, gpu: VirtualGpu, number: int) -> None:
        self._gpu = gpu
        self.cuda_stream = number
        self.operations: deque[Callable[[], bool]] = deque()

    def enqueue(self, operation: Callable[[], None]) -> None:
        def run() -> bool:
            operation()
            return True

        self.operations.append(run)
        self._gpu.run_some()

    def record_event(self) -> VirtualEvent:
        event = VirtualEvent(self._gpu)
        self.enqueue(lambda: setattr(event, "passed", True))
        return event

    def wait_event(self, event: VirtualEvent) -> None:
        self.operations.append(lambda: event.passed)

    def wait_stream(self, other: VirtualStream) -> None:
        self.wait_event(other.record_event())


class VirtualGpu:
    """Runs what is enqueued in any order that streams and events allow; some streams are slow."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._streams: list[VirtualStream] = []
        self._weights: list[float] = []
        self.engine = self.stream()

    def stream(self) -> VirtualStream:
        self._streams.append(VirtualStream(self, len(self._streams) + 1))
        self._weights.append(self._rng.choice([0.02, 0.3, 1.0]))
        return self._streams[-1]

    def numbered(self, handle: int) -> VirtualStream:
        """Return the stream with this handle."""
        return self._streams[handle - 1]

    def run(self, stream: VirtualStream, kernel: Callable[[], None]) -> None:
        stream.enqueue(kernel)

    def sleep(self, stream: VirtualStream) -> None:
        """Do nothing: every operation takes as long as chance wants."""

    def copy(self, destinations: Addresses, sources: Addresses, sizes: Addresses, stream: int) -> None:
        """Be the `Copy` of a mover: every range for itself, so that others come between."""
        for index in range(len(sizes)):
            part = slice(index, index + 1)
            ranges = destinations[part].copy(), sources[part].copy(), sizes[part].copy()
            self.numbered(stream).enqueue(lambda ranges=ranges: copy_on_host(*ranges, 0))

    def run_one(self) -> None:
        """Run one operation of a random stream whose next one can run."""
        order = sorted(
            self._streams, key=lambda s: self._rng.random() ** (1 / self._weights[s.cuda_stream - 1])
        )
        for stream in reversed(order):
            if stream.operations and stream.operations[0]():
                stream.operations.popleft()
                return
        assert not any(stream.operations for stream in self._streams), "a deadlock"

    def run_some(self) -> None:
        for _ in range(self._rng.randrange(3)):
            self.run_one()

    def synchronize(self) -> None:
        while any(stream.operations for stream in self._streams):
            self.run_one()
