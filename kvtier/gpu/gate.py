"""A gate in a stream, which the host opens, or another stream when it comes by."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

_LIBRARY = "libcuda.so.1"
_WAIT_UNTIL_AS_HIGH = 0
_WRITE_BEHIND_ALL_BEFORE = 0


class Gate:
    """Holds back what an engine enqueues, until it is known that loads are waited for layer by layer.

    Words of pinned memory, of which each closing takes the next one and waits for a higher number in it: what
    opens one does not open those before it. The GPU waits in a stream of the gate's own, since the engine's
    may be the legacy default stream.

    Attributes:
        words: How often the gate may be closed before the first closing is over.
    """

    words = 64

    def __init__(self, device: torch.device, library: Any = None) -> None:
        """Find the driver, and try the gate out. Waits for the GPU.

        Args:
            device: The GPU.
            library: The driver, None for the system's.

        Raises:
            OSError: There is no driver, or it cannot do this.
        """
        library = ctypes.CDLL(_LIBRARY) if library is None else library
        try:
            self._wait, self._write = library.cuStreamWaitValue32_v2, library.cuStreamWriteValue32_v2
        except AttributeError as error:
            raise OSError(f"the driver is too old: {error}") from error
        for call in (self._wait, self._write):
            call.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        self._device = device
        self._memory = torch.zeros(self.words, dtype=torch.int32).pin_memory()
        self._word = (ctypes.c_uint32 * self.words).from_address(self._memory.data_ptr())
        self._closed = 0
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.close(self._stream, self._stream)
        self._stream.synchronize()

    def close(self, engines: Any, behind: Any) -> None:
        """Hold back what comes next on a stream until `open`, or until another has done what is on it so far.

        Args:
            engines: The stream that is held back.
            behind: The stream that opens the gate when it comes by.

        Raises:
            OSError: The driver refuses; nothing is held back.
        """
        self._closed += 1
        round_, word = divmod(self._closed, self.words)
        address = self._memory.data_ptr() + word * self._memory.itemsize
        with torch.cuda.device(self._device):
            # What opens the gate is enqueued before anything waits for it, whatever queues streams share.
            status = self._write(behind.cuda_stream, address, round_ + 1, _WRITE_BEHIND_ALL_BEFORE)
            if status == 0:
                status = self._wait(self._stream.cuda_stream, address, round_ + 1, _WAIT_UNTIL_AS_HIGH)
        if status != 0:
            raise OSError(f"the driver refuses to wait for a number: CUDA error {status}")
        engines.wait_event(self._stream.record_event())

    def open(self) -> None:
        """Let pass what was held back by the last `close`."""
        round_, word = divmod(self._closed, self.words)
        self._word[word] = round_ + 1

    def is_captured(self) -> bool:
        """Say whether what is enqueued now goes into a CUDA graph instead of to the GPU."""
        return torch.cuda.is_current_stream_capturing()
