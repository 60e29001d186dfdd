"""Copies of many byte ranges by a kernel, which reads pinned host memory itself."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvtier.gpu.copies import Addresses, Copy
from kvtier.gpu.tables import Tables

RANGES = 16384
TABLES = 16
"""Ranges of one launch, and launches that may be under way: 4 MiB of their addresses."""

_IN_FLIGHT = 64 << 10
"""Words of 8 bytes that are under way at the same time: as many as the bus can use."""
_SPAN = 4096
_WORDS_A_WARP = 256
_ALIGNMENT = 16
_LIBRARY = "libcuda.so.1"
_DEVICE_POINTER = 3
"""CU_POINTER_ATTRIBUTE_DEVICE_POINTER: the address by which a kernel reaches memory, if it can."""


class KernelCopies:
    """Copies ranges of one certain size with one launch; others go to another `Copy`.

    So do those of memory that is not pinned: where the driver copies slowly, a kernel would end the process.

    The driver takes a microsecond of the calling thread for each range; a launch takes as much as a hundred
    ranges, however many there are. The kernel runs on few of the GPU's processors, beside other kernels, and
    leaves the engine that copies for the driver to others.
    """

    def __init__(self, device: torch.device, others: Copy, size: int, library: Any = None) -> None:
        """Take memory, and compile the kernel. Waits for the GPU.

        Args:
            device: The GPU that copies.
            others: Copies other ranges.
            size: Bytes of the ranges that the kernel copies.
            library: The driver, None for the system's.

        Raises:
            OSError: There is no driver.
            ImportError: Triton is not installed.
            Exception: It cannot compile here.
        """
        # Only machines with a GPU have Triton.
        from kvtier.gpu.copy_kernel import copy_ranges

        self._attribute = (ctypes.CDLL(_LIBRARY) if library is None else library).cuPointerGetAttribute
        self._attribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64]
        self._kernel = copy_ranges
        self._device = device
        self._others = others
        self._size = size
        with torch.cuda.device(device):
            self._tables = Tables(device, 2 * RANGES, TABLES)
            self._warm_up()

    def __call__(self, destinations: Addresses, sources: Addresses, sizes: Addresses, stream: int) -> None:
        """Enqueue copies; see `Copy`.

        Raises:
            CopyError: The driver refuses; some of the copies may be under way.
        """
        if not len(sizes):
            return
        external = torch.cuda.ExternalStream(stream, self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(external):
            if (sizes != self._size).any() or not (self._reaches(destinations) and self._reaches(sources)):
                self._others(destinations, sources, sizes, stream)
                return
            ranges = np.stack([destinations, sources], 1).view(np.int64)
            for first in range(0, len(ranges), RANGES):
                self._launch(ranges[first : first + RANGES], external)

    def _reaches(self, addresses: Addresses) -> bool:
        """Say whether a kernel can read and write at these addresses, which lie in one arena or one pool."""
        aligned = not (int(np.bitwise_or.reduce(addresses)) | self._size) % _ALIGNMENT
        ends = int(addresses.min()), int(addresses.max()) + self._size - 1
        return aligned and all(self._is_mapped(end) for end in ends)

    def _is_mapped(self, address: int) -> bool:
        found = ctypes.c_uint64(0)
        status = self._attribute(ctypes.byref(found), _DEVICE_POINTER, address)
        return status == 0 and found.value == address

    def _launch(self, ranges: NDArray[np.int64], stream: Any) -> None:
        words = self._size // 8
        span = min(_SPAN, max(_WORDS_A_WARP, 1 << (words - 1).bit_length()))
        spans = -(-words // span)
        items = spans * len(ranges)
        grid = (min(items, _IN_FLIGHT // span),)
        with self._tables.lend(ranges.reshape(-1), stream) as table:
            self._kernel[grid](table, spans, items, words, span, num_warps=span // _WORDS_A_WARP)

    def _warm_up(self) -> None:
        """Run the kernel once: compiling and loading it waits for the whole GPU."""
        block = torch.zeros(2, self._size, dtype=torch.uint8, device=self._device)
        ranges = np.array([[block[1].data_ptr(), block[0].data_ptr()]], np.int64)
        self._launch(ranges, torch.cuda.current_stream())
        torch.cuda.synchronize(self._device)
