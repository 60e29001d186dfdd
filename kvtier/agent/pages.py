"""The free pages of the arena that several stores share."""

from __future__ import annotations

from collections.abc import Iterable


class PagePool:
    """Free stretches of pages, lowest first; neighbours are one stretch.

    Attributes:
        total: Pages there are, free or not.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._runs = [(0, total)] if total else []

    @property
    def free(self) -> int:
        """How many pages are free."""
        return sum(end - start for start, end in self._runs)

    def take(self, size: int, count: int) -> list[int]:
        """Take up to `count` stretches of `size` pages each.

        Returns:
            The first page of each, ascending.
        """
        taken: list[int] = []
        left: list[tuple[int, int]] = []
        for start, end in self._runs:
            fit = min((end - start) // size, count - len(taken))
            taken.extend(range(start, start + fit * size, size))
            if start + fit * size < end:
                left.append((start + fit * size, end))
        self._runs = left
        return taken

    def give(self, starts: Iterable[int], size: int) -> None:
        """Take back stretches of `size` pages."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._runs, *((start, start + size) for start in starts)]):
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        self._runs = merged
