"""Which byte ranges make up blocks: addresses in a pool of pages, and in the slots of host memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_PAGE = -1
"""What stands for a page that a block does not have."""

FEW = 16
"""Ranges that are sooner made one by one than with arrays."""


class Region(NamedTuple):
    """Bytes that repeat once per page: `size` bytes at `base + stride * page`.

    Attributes:
        group: Index of the page among a block's pages.
        base: Address of page 0.
        stride: Bytes from one page to the next.
        size: Bytes of one page.
        pages: How many there are.
    """

    group: int
    base: int
    stride: int
    size: int
    pages: int


class Ranges(NamedTuple):
    """Byte ranges to copy, uint64 `[count]` each.

    Attributes:
        pool: Where they begin in the pool.
        host: Where they begin in host memory.
        sizes: Their lengths in bytes.
    """

    pool: NDArray[np.uint64]
    host: NDArray[np.uint64]
    sizes: NDArray[np.uint64]


class PageMap:
    """How blocks lie in a pool: a block is its pages' regions, one after the other if nothing else is said.

    Attributes:
        block_bytes: Bytes of a block, all its regions.
        sparse: Whether a block may lack the page of a group.
    """

    def __init__(
        self,
        regions: Sequence[Region],
        groups: int,
        *,
        sparse: bool = False,
        starts: Sequence[int] | None = None,
    ) -> None:
        """Take the regions of pages of `groups` groups.

        Args:
            regions: The regions.
            groups: How many groups of pages there are.
            sparse: See the attribute.
            starts: Where each region's bytes begin in host memory, from a block's address on, also before it;
                None: one after the other.
        """
        self.sparse = sparse
        if starts is None:
            starts = [0, *accumulate(region.size for region in regions)][:-1]
        kept = [(region, start) for region, start in zip(regions, starts, strict=True) if region.size]
        regions = [region for region, _ in kept]
        self._groups = groups
        self._kept = kept
        self._group = np.array([region.group for region in regions])
        self._pages = np.array([region.pages for region in regions], dtype=np.int64)
        self._base = np.array([region.base for region in regions], dtype=np.uint64)
        self._stride = np.array([region.stride for region in regions], dtype=np.uint64)
        self._size = np.array([region.size for region in regions], dtype=np.uint64)
        # A negative start is a large one here; its sum with an address wraps around to what is meant.
        self._start = np.array([start for _, start in kept], dtype=np.int64).astype(np.uint64)
        self.block_bytes = int(self._size.sum())

    def ranges(
        self, slots: NDArray[np.uint64], pages: Sequence[Sequence[int]], *, whole: bool = True
    ) -> Ranges:
        """Return the ranges of blocks, those that follow on each other joined.

        Args:
            slots: Address of each block in host memory, `[blocks]`.
            pages: Each block's page in every group.
            whole: Refuse blocks that lack a page, also where they may; else what has no page is left out.

        Raises:
            IndexError: A page that the pool does not have.
            ValueError: Not one page for every group.
        """
        if len(pages) * len(self._kept) <= FEW:
            return self._few(slots, pages, whole)
        ids, kept = self._chosen(pages, whole)
        pool = self._base + ids.astype(np.uint64) * self._stride
        host = slots[:, None] + self._start
        sizes = np.broadcast_to(self._size, ids.shape)
        found = Ranges(pool[kept], host[kept], sizes[kept])
        # Regions may lie in allocations of their own, which one copy must not span.
        return _joined(found) if len(self._size) == 1 else found

    def is_plain(self, alignment: int) -> bool:
        """Say whether every block is one range, without a page lacking, at a multiple of `alignment`."""
        return (
            len(self._size) == 1 and not self.sparse and int(self._base[0] | self._stride[0]) % alignment == 0
        )

    def starts(self, pages: Sequence[Sequence[int]]) -> NDArray[np.uint64]:
        """Return the address of each block, where a block is one range.

        Raises:
            IndexError: A page that the pool does not have.
            ValueError: Not one page for every group.
        """
        ids, _ = self._chosen(pages, True)
        starts: NDArray[np.uint64] = self._base[0] + ids[:, 0].astype(np.uint64) * self._stride[0]
        return starts

    def _few(self, slots: NDArray[np.uint64], pages: Sequence[Sequence[int]], whole: bool) -> Ranges:
        """Do what `ranges` does, one range after the other and without joining them."""
        pool: list[int] = []
        host: list[int] = []
        sizes: list[int] = []
        for slot, ids in zip(slots.tolist(), pages, strict=True):
            if len(ids) != self._groups:
                raise ValueError(f"{len(ids)} pages for {self._groups} groups")
            for region, start in self._kept:
                page = ids[region.group]
                if 0 <= page < region.pages:
                    pool.append(region.base + region.stride * page)
                    host.append(slot + start)
                    sizes.append(region.size)
                elif whole or not self.sparse or page != NO_PAGE:
                    raise IndexError(f"page {page} is wanted, its pool has {region.pages}")
        # Of all ways from a short list to an array this is by far the fastest.
        return Ranges(*(np.fromiter(numbers, np.uint64, len(sizes)) for numbers in (pool, host, sizes)))

    def _chosen(
        self, pages: Sequence[Sequence[int]], whole: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the page of each block's regions, `[blocks, regions]`, and which of them count."""
        # An iterator is read several times as fast as a list of tuples.
        ids = np.fromiter(chain.from_iterable(pages), dtype=np.int64)
        ids = ids.reshape(len(pages), self._groups)[:, self._group]
        # A negative page would be a valid offset: another request's bytes under this one's hash.
        wrong = (ids < 0) | (ids >= self._pages)
        kept = np.ones_like(wrong) if whole or not self.sparse else ids != NO_PAGE
        if (wrong & kept).any():
            block, region = np.argwhere(wrong & kept)[0]
            raise IndexError(f"page {ids[block, region]} is wanted, its pool has {self._pages[region]}")
        return ids, kept


def _joined(ranges: Ranges) -> Ranges:
    pool, host, sizes = ranges
    if len(sizes) < 2:
        return ranges
    follows = (pool[1:] == pool[:-1] + sizes[:-1]) & (host[1:] == host[:-1] + sizes[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    return Ranges(pool[starts], host[starts], np.add.reduceat(sizes, starts))
