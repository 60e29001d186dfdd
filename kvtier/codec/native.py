"""Blocks of codec 2 decoded in one call without the GIL, where the C functions for that are at hand.

Python's bindings take the GIL between any two sections, so that a dozen threads that decode blocks spend
their time on handing it to each other. `native_kernels` calls zstd and XXH3 itself: zstd from the system's
library, or else from `backports.zstd`, XXH3 from `xxhash`, whose extension modules export the C functions on
Linux. Where they are missing, `functions` is None, and the bindings do the same section by section.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import binding

from kvtier.codec.format import FIXED_BYTES, Buffer, Bytes, header_bytes
from kvtier.codec.nibbles import NibbleShape
from kvtier.codec.planes import MAX_FRAME_BYTES
from kvtier.codec.slots import PlaneSlots
from kvtier.codec.source import StoredFile

_ZSTD = ("ZSTD_decompressDCtx", "ZSTD_getFrameContentSize", "ZSTD_createDCtx", "ZSTD_freeDCtx")
_XXH3 = ("XXH3_64bits", "XXH3_64bits_update")
_XXH3_STATE = ("XXH3_64bits_reset", "XXH3_64bits_digest", "XXH3_createState", "XXH3_freeState")
_SLACK = 4096
_NOTHING = np.empty(0, np.uint8)


def _find() -> dict[str, Any] | None:
    """Return the functions, made known to the compiler; None where one of them is missing."""
    for zstd in ("libzstd.so.1", _file_of("backports.zstd._zstd")):
        try:
            found = _functions(zstd, _ZSTD) | _xxh3(_file_of("xxhash._xxhash"))
        except (OSError, AttributeError):
            continue
        for name, function in found.items():
            binding.add_symbol(f"kvtier_{name}", ctypes.cast(function, ctypes.c_void_p).value)
        return found
    return None


def _xxh3(library: str) -> dict[str, Any]:
    """Return XXH3's functions: on x86 those that use what the processor has, twice as fast as SSE2."""
    found = _functions(library, _XXH3_STATE)
    try:
        fastest = _functions(library, [f"{name}_dispatch" for name in _XXH3])
        return found | dict(zip(_XXH3, fastest.values(), strict=True))
    except AttributeError:
        return found | _functions(library, _XXH3)


def _functions(library: str, names: Sequence[str]) -> dict[str, Any]:
    loaded = ctypes.CDLL(library)
    return {name: getattr(loaded, name) for name in names}


def _file_of(module: str) -> str:
    try:
        return importlib.import_module(module).__file__ or "missing"
    except ImportError:
        return "missing"


functions = _find()


class _Workspace(threading.local):
    """One thread's contexts and rooms; they go with the thread."""

    def __init__(self, room_bytes: int, parts_bytes: int) -> None:
        assert functions is not None
        self.room = np.empty(room_bytes, np.uint8)
        self.parts = np.empty(parts_bytes, np.uint8)
        self.context = self._make("ZSTD_createDCtx", "ZSTD_freeDCtx")
        self.state = self._make("XXH3_createState", "XXH3_freeState")

    def _make(self, create: str, free: str) -> int:
        assert functions is not None
        functions[create].restype = ctypes.c_void_p
        functions[free].argtypes = [ctypes.c_void_p]
        made: int | None = functions[create]()
        if made is None:
            raise MemoryError(f"no memory for {create}")
        weakref.finalize(self.room, functions[free], made)
        return made


class NativeDecoder:
    """Decodes the blocks of one layout that are stored by codec 2; for several threads at the same time."""

    def __init__(
        self, shape: NibbleShape, frames: Sequence[tuple[int, int]], form: PlaneSlots | None
    ) -> None:
        """Prepare.

        Args:
            shape: Geometry of a shard.
            frames: For each frame of a shard its raw length, and 1 where it may be split, else 0.
            form: Plane slots; None for raw ones.
        """
        from kvtier.codec import native_kernels as kernels

        self._kernel = kernels.decode_block
        layout = shape.layout
        parts = form if form is not None else PlaneSlots(shape)
        stride = parts.shard_bytes if form is not None else parts.rest_at
        raw_target = kernels.TO_BF16 if layout.dtype == "bfloat16" else kernels.TO_E4M3
        layers, kv_factor, heads, tokens, _ = shape.raw
        self._numbers = np.array(
            [
                kernels.TO_PLANES if form is not None else raw_target,
                *(layers, kv_factor, heads, tokens, shape.bases[-1]),
                *(parts.bases_at, parts.nibbles_at, parts.escapes_at, stride),
                *(shape.elements, layout.shard_bytes),
            ]
        )
        plan: list[tuple[int, int, int]] = []
        for shard in range(layout.shards):
            place = shard * stride + parts.bases_at
            for raw_bytes, splittable in frames:
                plan.append((kernels.SPLITTABLE if splittable else kernels.FRAME, raw_bytes, place))
                place += raw_bytes
                if place == shard * stride + parts.bases_at + shape.base_bytes:
                    place = shard * stride + parts.nibbles_at
            plan.append((kernels.LISTED, 4 * shape.max_escapes, shard * stride + parts.escapes_at))
        plan += [
            (kernels.REST, shape.rest_bytes, shard * stride + parts.rest_at) for shard in range(layout.shards)
        ]
        self._plan = np.array(plan)
        self._to_raw = form is None
        layer_bytes = shape.rest_bytes // layers
        frame_bytes = 2 * MAX_FRAME_BYTES + 4 * shape.max_escapes
        room_bytes = header_bytes(len(plan)) + max(kernels.PIECE, layer_bytes, frame_bytes) + _SLACK
        self._work = _Workspace(room_bytes, layout.shards * stride if form is None else 0)

    def decode(self, fixed: bytes, encoded: Buffer | StoredFile, length: int, slot: Bytes) -> bool:
        """Verify a block and decode it.

        Args:
            fixed: What its header must begin with.
            encoded: The block.
            length: Its bytes.
            slot: Room for it, in the form of the slots.

        Returns:
            Whether it was decoded. If not, it is corrupt or of another kind, and the slot holds garbage.
        """
        if len(fixed) != FIXED_BYTES or length <= FIXED_BYTES:
            return False
        work = self._work
        if isinstance(encoded, StoredFile):
            data, descriptor = _NOTHING, encoded.descriptor
        else:
            data, descriptor = np.frombuffer(encoded, np.uint8), -1
        parts, raw = (work.parts, slot) if self._to_raw else (slot, _NOTHING)
        beginning = np.frombuffer(fixed, np.uint8)
        kernel: Any = self._kernel
        return bool(
            kernel(
                *(work.context, work.state, data, descriptor, length, beginning),
                *(self._plan, self._numbers, work.room, parts, raw),
            )
        )
