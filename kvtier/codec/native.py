"""Sections verified and decoded in one call without the GIL, where the C functions for that are at hand.

Python's bindings take the GIL between any two sections, so that a dozen threads that decode blocks spend
their time on handing it to each other. The compiled loop here calls zstd and XXH3 itself: zstd from the
system's library, or else from `backports.zstd`, XXH3 from `xxhash`, whose extension modules export the C
functions on Linux. Where they are missing, `sections_decoder` is None, and the bindings do the same section
by section.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import binding
from numba import types

from kvtier.codec.format import ZSTD, Section
from kvtier.codec.kernels import compiled

Numbers = np.ndarray[Any, np.dtype[np.uint64]]

_ZSTD = ("ZSTD_decompressDCtx", "ZSTD_getFrameContentSize", "ZSTD_createDCtx", "ZSTD_freeDCtx")
_ADDRESS: Any = types.uintp
_LENGTH: Any = types.uint64
_xxh3 = types.ExternalFunction("kvtier_XXH3_64bits", _LENGTH(_ADDRESS, _LENGTH))
_decompress = types.ExternalFunction(
    "kvtier_ZSTD_decompressDCtx", _LENGTH(_ADDRESS, _ADDRESS, _LENGTH, _ADDRESS, _LENGTH)
)
_copy = types.ExternalFunction("memcpy", _ADDRESS(_ADDRESS, _ADDRESS, _LENGTH))
_content_size = types.ExternalFunction("kvtier_ZSTD_getFrameContentSize", _LENGTH(_ADDRESS, _LENGTH))
_NUMBERS = types.Array(_LENGTH, 1, "C", readonly=True)
_SIGNATURE = types.int64(_ADDRESS, _ADDRESS, types.Array(_LENGTH, 2, "C", readonly=True), _NUMBERS)


def _find() -> dict[str, Any] | None:
    """Return the functions, made known to the compiler; None where one of them is missing."""
    for zstd in ("libzstd.so.1", _file_of("backports.zstd._zstd")):
        try:
            found = _functions(zstd, _ZSTD) | _functions(_file_of("xxhash._xxhash"), ("XXH3_64bits",))
        except (OSError, AttributeError):
            continue
        for name, function in found.items():
            binding.add_symbol(f"kvtier_{name}", ctypes.cast(function, ctypes.c_void_p).value)
        return found
    return None


def _functions(library: str, names: Sequence[str]) -> dict[str, Any]:
    loaded = ctypes.CDLL(library)
    return {name: getattr(loaded, name) for name in names}


def _file_of(module: str) -> str:
    try:
        return importlib.import_module(module).__file__ or "missing"
    except ImportError:
        return "missing"


def _decode(context: Any, base: Any, sections: Any, targets: Any) -> Any:
    count = sections.shape[0]
    for i in range(count):
        source, stored, length = base + sections[i, 1], sections[i, 2], sections[i, 3]
        if _xxh3(source, stored) != sections[i, 4]:
            return i
        if sections[i, 0] == ZSTD:
            if _content_size(source, stored) != length:
                return count + i
            if _decompress(context, targets[i], length, source, stored) != length:
                return count + i
        elif targets[i]:
            _copy(targets[i], source, stored)
    return -1


class SectionsDecoder:
    """Decodes sections; for several threads at the same time."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self._kernel: Callable[[int, int, Numbers, Numbers], Any] = compiled(_SIGNATURE)(_decode)
        self._create, self._free = functions["ZSTD_createDCtx"], functions["ZSTD_freeDCtx"]
        self._create.restype = ctypes.c_void_p
        self._free.argtypes = [ctypes.c_void_p]
        self._local = threading.local()

    def __call__(self, encoded: memoryview, sections: Sequence[Section], targets: Sequence[int]) -> int:
        """Verify and decode sections.

        Args:
            encoded: The block, none of whose sections reaches beyond it.
            sections: Its table.
            targets: Address of the room of each section's raw length; 0: it is only verified.

        Returns:
            -1, or the index of the first section whose checksum is wrong, or that index and the number of
            sections when it is no frame of the length that the table says.
        """
        start = np.frombuffer(encoded, np.uint8).ctypes.data
        table = np.array(sections, np.uint64)
        return int(self._kernel(self._context(), start, table, np.array(targets, np.uint64)))

    def _context(self) -> int:
        context: int | None = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = self._create()
            if context is None:
                raise MemoryError("zstd has no memory for a context")
            # A thread's own object goes with the thread, and takes the context with it.
            self._local.owner = owner = _Owner()
            weakref.finalize(owner, self._free, context)
        return context


class _Owner:
    """What a context belongs to."""


_found = _find()
sections_decoder = SectionsDecoder(_found) if _found is not None else None
