"""Copies of many byte ranges with one call, on a stream of the GPU or at once on the host."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier._logging import log_once

_log = logging.getLogger(__name__)

Addresses = NDArray[np.uint64]

Copy = Callable[[Addresses, Addresses, Addresses, int], None]
"""Enqueues copies: destinations, sources, sizes in bytes, handle of the stream. They are over before what is
enqueued next on the stream begins, in no order among themselves."""

_LIBRARY = "libcuda.so.1"
_SOURCE_IN_STREAM_ORDER = 1
_PREFER_OVERLAP_WITH_COMPUTE = 1


class CopyError(RuntimeError):
    """The driver refuses a copy."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes: when sources are read. The hints of places concern managed memory alone."""

    _fields_ = [
        ("source_access_order", ctypes.c_int),
        ("source", _Location),
        ("destination", _Location),
        ("flags", ctypes.c_uint),
    ]


class CudaCopies:
    """Copies through the driver: `cuMemcpyBatchAsync` where it has it (CUDA 12.8), else one call for each.

    The driver is called directly, without cuda-bindings: the arrays of addresses go to it as they are, and
    its entry points keep their signatures, while the runtime's changed between CUDA 12 and 13.
    """

    def __init__(self, device: torch.device, library: Any = None) -> None:
        """Find the driver.

        Args:
            device: The GPU whose memory is copied from or to.
            library: The driver, None for the system's.

        Raises:
            OSError: There is no driver.
        """
        library = ctypes.CDLL(_LIBRARY) if library is None else library
        self._device = device
        self._one = library.cuMemcpyAsync
        self._one.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
        self._batch = getattr(library, "cuMemcpyBatchAsync", None)
        if self._batch is not None:
            pointer, size = ctypes.c_void_p, ctypes.c_size_t
            self._batch.argtypes = [pointer, pointer, pointer, size, pointer, pointer, size, pointer, pointer]
        self._attributes = _Attributes(_SOURCE_IN_STREAM_ORDER, flags=_PREFER_OVERLAP_WITH_COMPUTE)
        self._first = ctypes.c_size_t(0)

    def __call__(self, destinations: Addresses, sources: Addresses, sizes: Addresses, stream: int) -> None:
        """Enqueue copies; see `Copy`. The legacy default stream (handle 0) takes no batches.

        Raises:
            CopyError: The driver refuses; some of the copies may be under way.
        """
        if not len(sizes):
            return
        # The driver works in the thread's context, which this makes that of the device.
        with torch.cuda.device(self._device):
            if self._batch is not None:
                status = self._call_batch(self._batch, destinations, sources, sizes, stream)
                if status == 0:
                    return
                # Copied again one by one, which is no harm.
                self._batch = None
                log_once(_log, "batch", "the driver takes no batches of copies: CUDA error %d", status)
            for destination, source, size in zip(
                destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True
            ):
                status = self._one(destination, source, size, stream)
                if status != 0:
                    raise CopyError(f"a copy of {size} bytes is refused: CUDA error {status}")

    def _call_batch(
        self, batch: Any, destinations: Addresses, sources: Addresses, sizes: Addresses, stream: int
    ) -> int:
        failed = ctypes.c_size_t(0)
        return int(
            batch(
                destinations.ctypes.data,
                sources.ctypes.data,
                sizes.ctypes.data,
                len(sizes),
                ctypes.addressof(self._attributes),
                ctypes.addressof(self._first),
                1,
                ctypes.addressof(failed),
                stream,
            )
        )


def copy_on_host(destinations: Addresses, sources: Addresses, sizes: Addresses, stream: int) -> None:
    """Copy at once, all of it in host memory; see `Copy`."""
    for destination, source, size in zip(
        destinations.tolist(), sources.tolist(), sizes.tolist(), strict=True
    ):
        ctypes.memmove(destination, source, size)
