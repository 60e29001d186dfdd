"""Small arrays of numbers on the GPU, for kernels that are launched while an engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

_ROW_NUMBERS = 32
"""Rooms begin at multiples of so many numbers: of 256 bytes."""


def _event() -> Any:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


class Tables:
    """Rooms for arrays of int64, in pinned memory and in the GPU's, that are used again and again.

    Taking memory of either kind may wait for the whole GPU, and fails where the engine has all of it. So it
    is taken once, before the engine computes anything.
    """

    def __init__(
        self, device: torch.device, numbers: int, rooms: int, make_event: Callable[[], Any] = _event
    ) -> None:
        """Take the memory.

        Args:
            device: The GPU.
            numbers: The most that an array has.
            rooms: How many arrays are under way at the most; beyond that each takes memory of its own.
            make_event: Makes what tells how far a stream is.
        """
        room = -(-numbers // _ROW_NUMBERS) * _ROW_NUMBERS
        self._device = device
        self._pinned = device.type == "cuda"
        self._host = torch.empty(rooms, room, dtype=torch.int64, pin_memory=self._pinned)
        self._values: NDArray[np.int64] = self._host.numpy()
        self._gpu = torch.empty(rooms, room, dtype=torch.int64, device=device)
        self._over = [make_event() for _ in range(rooms)]
        self._last = -1

    @contextmanager
    def lend(self, values: NDArray[np.int64], stream: Any) -> Iterator[torch.Tensor]:
        """Enqueue an array to the GPU, for what is enqueued behind it until the context ends.

        Args:
            values: Int64 `[count]`, no more than `numbers`. They are read before this returns.
            stream: The current stream.

        Returns:
            The array on the GPU, at a multiple of 256 bytes.
        """
        room = self._free()
        if room is None:
            own = torch.from_numpy(values)
            # PyTorch keeps both memories from others until what is on the stream by then is over.
            yield (own.pin_memory() if self._pinned else own).to(self._device, non_blocking=True, copy=True)
            return
        self._last = room
        count = len(values)
        self._values[room, :count] = values
        table = self._gpu[room, :count]
        try:
            table.copy_(self._host[room, :count], non_blocking=True)
            yield table
        finally:
            self._over[room].record(stream)

    def _free(self) -> int | None:
        """Return a room that nothing under way uses, None if there is none."""
        count = len(self._over)
        rooms = ((self._last + step) % count for step in range(1, count + 1))
        return next((room for room in rooms if self._over[room].query()), None)
