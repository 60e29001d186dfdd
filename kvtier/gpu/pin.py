"""Page-locking host memory for CUDA, so that copies run at bus speed and beside the engine's work."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
from contextlib import suppress
from typing import Any

import torch

from kvtier._logging import log_once
from kvtier.gpu.capture import beside_captures

_log = logging.getLogger(__name__)

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all contexts of the process."""

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE, of Linux 5.14."""

_THREADS = 4
"""More of them provide pages no faster: 4 GiB a second, where registering does it at one."""


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class PinnedMemory:
    """Host memory registered with CUDA until `unpin`. Made by `pin`."""

    def __init__(self, address: int) -> None:
        self._address: int | None = address

    def unpin(self) -> None:
        """Take the registration back; waits for copies under way. A second call does nothing."""
        address, self._address = self._address, None
        if address is not None:
            with beside_captures():
                _cudart().cudaHostUnregister(address)


def populate(address: int, size: int) -> None:
    """Have the kernel provide the pages of memory that nobody has touched, as far as it can. Changes no byte.

    Args:
        address: Where the memory begins, page-aligned.
        size: How long it is in bytes.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    share = -(-size // _THREADS // mmap.PAGESIZE) * mmap.PAGESIZE
    parts = [(address + first, min(share, size - first)) for first in range(0, size, share)]
    threads = [threading.Thread(target=advise, args=(*part, _POPULATE_WRITE)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pin(buffer: memoryview, device: torch.device) -> PinnedMemory | None:
    """Register memory with CUDA, as far as that is possible.

    Args:
        buffer: Writable bytes, page-aligned, that stay mapped until `unpin`.
        device: The GPU that will copy from and to it.

    Returns:
        The registration, or None, with a warning, where CUDA refuses: copies then are several times slower
        and hold up the thread that asks for them.
    """
    started = time.monotonic()
    try:
        address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
        populate(address, len(buffer))
        # A client of the agent pins when the agent is there, whatever its engine does at the time.
        with beside_captures(), torch.cuda.device(device):
            status = int(_cudart().cudaHostRegister(address, len(buffer), _PORTABLE))
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        log_once(_log, "pin", "the arena cannot be pinned, copies will be slow: %r", error)
        return None
    if status != 0:
        # CUDA keeps the error and gives it to the thread's next kernel: here one that does not matter.
        with suppress(RuntimeError):
            torch.zeros(1, device=device)
        log_once(_log, "pin", "the arena cannot be pinned, copies will be slow: CUDA error %d", status)
        return None
    _log.info("pinned %d MiB of the arena in %.1f s", len(buffer) >> 20, time.monotonic() - started)
    return PinnedMemory(address)
