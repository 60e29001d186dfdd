"""Copies of many byte ranges by a kernel, which reads pinned host memory itself."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch

from kvtier.gpu.copies import Addresses, Copy

_SPAN = 512
_WARPS = 4
_ALIGNMENT = 16
_LIBRARY = "libcuda.so.1"
_DEVICE_POINTER = 3
"""CU_POINTER_ATTRIBUTE_DEVICE_POINTER: the address by which a kernel reaches memory, if it can."""


class KernelCopies:
    """Copies ranges of one certain size with one launch; others go to another `Copy`.

    So do those of memory that is not pinned: where the driver copies slowly, a kernel would end the process.

    The driver takes a microsecond of the calling thread for each range; a launch takes as much as a hundred
    ranges, however many there are. The kernel keeps the GPU's processors busy, so it is for copies that the
    engine waits for anyway.
    """

    def __init__(self, device: torch.device, others: Copy, size: int, library: Any = None) -> None:
        """Compile the kernel. Waits for the GPU.

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
            ranges = torch.from_numpy(np.stack([destinations, sources], 1).view(np.int64))
            # The pinned memory is not used again before it has been read, nor the GPU's on another stream.
            self._launch(ranges.pin_memory().to(self._device, non_blocking=True))

    def _reaches(self, addresses: Addresses) -> bool:
        """Say whether a kernel can read and write at these addresses, which lie in one arena or one pool."""
        aligned = not (int(np.bitwise_or.reduce(addresses)) | self._size) % _ALIGNMENT
        ends = int(addresses.min()), int(addresses.max()) + self._size - 1
        return aligned and all(self._is_mapped(end) for end in ends)

    def _is_mapped(self, address: int) -> bool:
        found = ctypes.c_uint64(0)
        status = self._attribute(ctypes.byref(found), _DEVICE_POINTER, address)
        return status == 0 and found.value == address

    def _launch(self, ranges: torch.Tensor) -> None:
        words = self._size // 8
        grid = (ranges.shape[0], -(-words // _SPAN))
        self._kernel[grid](ranges, words, _SPAN, num_warps=_WARPS)

    def _warm_up(self) -> None:
        """Run the kernel once: compiling and loading it waits for the whole GPU."""
        block = torch.zeros(2, self._size, dtype=torch.uint8, device=self._device)
        ranges = torch.tensor([[block[1].data_ptr(), block[0].data_ptr()]], device=self._device)
        with torch.cuda.device(self._device):
            self._launch(ranges)
            torch.cuda.synchronize(self._device)
