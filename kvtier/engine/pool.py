"""Who owns which page: allocation, and reuse of freed blocks by prefix."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

NO_PAGE = -1


@dataclass(eq=False, slots=True)
class Block:
    """One block of tokens: its page in each layer group (-1: none), and how many requests hold it.

    Attributes:
        pages: Page index by group.
        refs: Holders; 0 while the block only waits for reuse.
        key: The prefix it is registered under, or None.
        fresh: Nothing valid has been written to it yet.
    """

    pages: list[int]
    refs: int = 1
    key: bytes | None = None
    fresh: bool = True


class OutOfPages(Exception):
    """No page is free and none can be evicted."""


class BlockPool:
    """Blocks that are free, held, or kept for reuse until their pages are needed, oldest first."""

    def __init__(self, num_pages: Sequence[int]) -> None:
        self.num_blocks = min(num_pages)
        # Odd groups hand pages out from the top, so that indices differ between groups from the start.
        self._free = [
            deque(range(count) if group % 2 == 0 else reversed(range(count)))
            for group, count in enumerate(num_pages)
        ]
        self._registered: dict[bytes, Block] = {}
        self._idle: OrderedDict[bytes, Block] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, evicting what only waits for reuse."""
        return min(len(pages) for pages in self._free) + len(self._idle)

    def allocate(self, without: Collection[int] = ()) -> Block:
        """Take a block; groups in `without` get no page.

        Raises:
            OutOfPages: Everything is held.
        """
        while any(not pages for group, pages in enumerate(self._free) if group not in without):
            self._evict_oldest()
        pages = [NO_PAGE if group in without else free.popleft() for group, free in enumerate(self._free)]
        return Block(pages)

    def match(self, keys: Sequence[bytes]) -> list[Block]:
        """Return, and hold, the blocks of the longest leading run of `keys`."""
        found = []
        for key in keys:
            block = self._registered.get(key)
            if block is None:
                break
            block.refs += 1
            self._idle.pop(key, None)
            found.append(block)
        return found

    def register(self, block: Block, key: bytes) -> None:
        """Offer a computed block for reuse, unless its prefix is held elsewhere or a page is missing."""
        if block.key is None and key not in self._registered and NO_PAGE not in block.pages:
            block.key = key
            self._registered[key] = block

    def release(self, blocks: Sequence[Block]) -> None:
        """Let go of a chain of blocks; its end is evicted before its beginning."""
        for block in reversed(blocks):
            block.refs -= 1
            if block.refs == 0:
                if block.key is None:
                    self._recycle(block)
                else:
                    self._idle[block.key] = block

    def drop_page(self, block: Block, group: int) -> None:
        """Free one group's page of a block that a single request holds and nobody can reuse."""
        if block.key is None and block.refs == 1 and block.pages[group] != NO_PAGE:
            self._free[group].append(block.pages[group])
            block.pages[group] = NO_PAGE

    def forget(self) -> None:
        """Evict everything that only waits for reuse."""
        while self._idle:
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        if not self._idle:
            raise OutOfPages
        key, block = self._idle.popitem(last=False)
        del self._registered[key]
        self._recycle(block)

    def _recycle(self, block: Block) -> None:
        for group, page in enumerate(block.pages):
            if page != NO_PAGE:
                self._free[group].append(page)
