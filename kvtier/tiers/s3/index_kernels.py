"""Compiled loops of the block index: an open-addressing table from hashes to rows.

A slot holds a row's number plus one, 0 where it was never used, -1 where its block was removed. Hashes are
pairs of 64-bit words. Readers take no lock: a row is complete before its number is put into a slot, and slots
are single words. The seed keeps whoever writes to the bucket from choosing hashes that collide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

Words = np.ndarray[Any, np.dtype[np.uint64]]
Slots = np.ndarray[Any, np.dtype[np.int32]]
Owners = np.ndarray[Any, np.dtype[np.int32]]
Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def _compiled(signature: str) -> Callable[[Kernel], Kernel]:
    """Compile at import, from numba's cache where there is a directory for one; see the codec's kernels."""

    def decorate(function: Kernel) -> Kernel:
        try:
            compiled: Any = njit(signature, nogil=True, cache=True)(function)
        except (RuntimeError, OSError):
            compiled = njit(signature, nogil=True)(function)
        return cast(Kernel, compiled)

    return decorate


@_compiled("int64(int32[::1], uint64[:, ::1], uint64, uint64, uint64)")
def find(slots: Slots, hashes: Words, seed: int, first: int, second: int) -> int:
    """Return the slot of a hash, or -1."""
    mask = np.uint64(len(slots) - 1)
    mixed = (first ^ seed) * np.uint64(0x9E3779B97F4A7C15)
    at = (mixed ^ (mixed >> np.uint64(32))) & mask
    while True:
        row = slots[at]
        if row == 0:
            return -1
        # A reader may still hold shorter columns than those that the row is in.
        if 0 < row <= len(hashes) and hashes[row - 1, 0] == first and hashes[row - 1, 1] == second:
            return np.int64(at)  # type: ignore[no-any-return]
        at = (at + np.uint64(1)) & mask


@_compiled("int64(int32[::1], uint64[:, ::1], uint64, uint64[:, ::1])")
def leading(slots: Slots, hashes: Words, seed: int, wanted: Words) -> int:
    """Return how many of `wanted`, from the first on, are in the table."""
    for place in range(len(wanted)):
        if find(slots, hashes, seed, wanted[place, 0], wanted[place, 1]) < 0:
            return place
    return len(wanted)


@_compiled("void(int32[::1], uint64[:, ::1], uint64, uint64[:, ::1], int64[::1])")
def rows_of(slots: Slots, hashes: Words, seed: int, wanted: Words, rows: np.ndarray[Any, Any]) -> None:
    """Write the row of each of `wanted` to `rows`, -1 where there is none."""
    for place in range(len(wanted)):
        at = find(slots, hashes, seed, wanted[place, 0], wanted[place, 1])
        row = slots[at] if at >= 0 else 0
        # Somebody may remove or replace it between the two looks.
        rows[place] = row - 1 if 0 < row <= len(hashes) else -1


@_compiled("int64(int32[::1], uint64[:, ::1], uint64, int32[::1], int32[::1], int64, int64, boolean[::1])")
def enter(
    slots: Slots,
    hashes: Words,
    seed: int,
    owners: Owners,
    counts: np.ndarray[Any, np.dtype[np.int32]],
    start: int,
    end: int,
    refused: np.ndarray[Any, np.dtype[np.bool_]],
) -> int:
    """Put rows `start` to `end` into the table and return how many blocks are new in it.

    A block that a pack with more blocks has (by `counts`, through `owners`) stays there.
    """
    mask = np.uint64(len(slots) - 1)
    added = 0
    for row in range(start, end):
        if refused[row - start]:
            continue
        at = find(slots, hashes, seed, hashes[row, 0], hashes[row, 1])
        if at >= 0:
            if counts[owners[slots[at] - 1]] <= counts[owners[row]]:
                slots[at] = row + 1
            continue
        mixed = (hashes[row, 0] ^ seed) * np.uint64(0x9E3779B97F4A7C15)
        free = (mixed ^ (mixed >> np.uint64(32))) & mask
        # A slot of a removed block is not used again: a reader could pass by what moves before it.
        while slots[free] != 0:
            free = (free + np.uint64(1)) & mask
        slots[free] = row + 1
        added += 1
    return added


@_compiled("int64(int32[::1], uint64[:, ::1], uint64, int64, int64)")
def remove(slots: Slots, hashes: Words, seed: int, start: int, end: int) -> int:
    """Take the blocks that are known by rows `start` to `end` out of the table; return how many."""
    removed = 0
    for row in range(start, end):
        at = find(slots, hashes, seed, hashes[row, 0], hashes[row, 1])
        if at >= 0 and slots[at] == row + 1:
            slots[at] = -1
            removed += 1
    return removed


@_compiled("void(int32[::1], int32[::1], uint64[:, ::1], uint64)")
def rehash(old: Slots, new: Slots, hashes: Words, seed: int) -> None:
    """Put everything in `old` into the empty, larger `new`."""
    mask = np.uint64(len(new) - 1)
    for row in old:
        if row > 0:
            mixed = (hashes[row - 1, 0] ^ seed) * np.uint64(0x9E3779B97F4A7C15)
            at = (mixed ^ (mixed >> np.uint64(32))) & mask
            while new[at] != 0:
                at = (at + np.uint64(1)) & mask
            new[at] = row
