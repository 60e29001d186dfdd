"""Calls of CUDA from a thread of kvtier's own while an engine's thread captures a graph."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LIBRARY = "libcuda.so.1"
_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: calls of this thread have nothing to do with what others capture."""


@contextmanager
def beside_captures(library: Any = None) -> Iterator[None]:
    """Let this thread call CUDA although another may be capturing a graph.

    Engines capture in the mode in which registering memory, or asking for an event, fails in every thread of
    the process, and makes the capture fail, too: for CUDA does not know that they are not part of it.

    Args:
        library: The driver, None for the system's.

    Raises:
        OSError: There is no driver.
    """
    exchange = (ctypes.CDLL(_LIBRARY) if library is None else library).cuThreadExchangeStreamCaptureMode
    exchange.argtypes = [ctypes.c_void_p]
    mode = ctypes.c_int(_RELAXED)
    # The thread's former mode comes back in its place.
    exchange(ctypes.addressof(mode))
    try:
        yield
    finally:
        exchange(ctypes.addressof(mode))
