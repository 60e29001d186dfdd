"""Sections verified and decoded in one call without the GIL, where the C functions for that are at hand.

Python's bindings take the GIL between any two sections, so that a dozen threads that decode blocks spend
their time on handing it to each other. The compiled loop here calls zstd and XXH3 itself: the functions
inside of the `backports.zstd` and `xxhash` extension modules, which are plain exported symbols on Linux.
Where they are missing, `sections_decoder` is None, and the bindings do the same section by section.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding
from numba import types

from kvtier.codec.kernels import compiled

Table = np.ndarray[Any, np.dtype[np.uint64]]

OFFSET, STORED, CHECKSUM, TARGET, RAW, IS_FRAME = range(6)
"""Columns of a table of sections, uint64: where the section starts, its length, its XXH3-64, the address that
it is decoded to (0: it is only verified), its length there, and whether it is a zstd frame."""

_FUNCTIONS = (
    ("xxhash._xxhash", "XXH3_64bits"),
    ("backports.zstd._zstd", "ZSTD_decompressDCtx"),
    ("backports.zstd._zstd", "ZSTD_createDCtx"),
    ("backports.zstd._zstd", "ZSTD_freeDCtx"),
)
_ADDRESS: Any = types.uintp
_LENGTH: Any = types.uint64
_xxh3 = types.ExternalFunction("kvtier_XXH3_64bits", _LENGTH(_ADDRESS, _LENGTH))
_decompress = types.ExternalFunction(
    "kvtier_ZSTD_decompressDCtx", _LENGTH(_ADDRESS, _ADDRESS, _LENGTH, _ADDRESS, _LENGTH)
)
_copy = types.ExternalFunction("memcpy", _ADDRESS(_ADDRESS, _ADDRESS, _LENGTH))
_SIGNATURE = types.int64(_ADDRESS, _ADDRESS, types.Array(_LENGTH, 2, "C", readonly=True))


def _find() -> dict[str, Any] | None:
    """Return the functions, made known to the compiler; None where one of them is missing."""
    found: dict[str, Any] = {}
    try:
        for module, name in _FUNCTIONS:
            library = ctypes.CDLL(importlib.import_module(module).__file__)
            found[name] = getattr(library, name)
    except (ImportError, OSError, AttributeError, TypeError):
        return None
    for name, function in found.items():
        binding.add_symbol(f"kvtier_{name}", ctypes.cast(function, ctypes.c_void_p).value)
    return found


def _decode(context: Any, base: Any, table: Any) -> Any:
    count = table.shape[0]
    for i in range(count):
        source, stored = base + table[i, 0], table[i, 1]
        if _xxh3(source, stored) != table[i, 2]:
            return i
        if table[i, 5]:
            if _decompress(context, table[i, 3], table[i, 4], source, stored) != table[i, 4]:
                return count + i
        elif table[i, 3]:
            _copy(table[i, 3], source, stored)
    return -1


class SectionsDecoder:
    """Decodes sections; for several threads at the same time."""

    def __init__(self, functions: dict[str, Any]) -> None:
        self._kernel: Callable[[int, int, Table], Any] = compiled(_SIGNATURE)(_decode)
        self._create, self._free = functions["ZSTD_createDCtx"], functions["ZSTD_freeDCtx"]
        self._create.restype = ctypes.c_void_p
        self._free.argtypes = [ctypes.c_void_p]
        self._local = threading.local()

    def __call__(self, encoded: memoryview, table: Table) -> int:
        """Verify and decode sections.

        Args:
            encoded: What the sections lie in; they must not reach beyond it.
            table: Their table, `[sections, 6]`; the room at the targets must be writable and large enough.

        Returns:
            -1, or the index of the first section whose checksum is wrong, or that index and the number of
            sections when it is no frame of the length that the table says.
        """
        return int(self._kernel(self._context(), np.frombuffer(encoded, np.uint8).ctypes.data, table))

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
