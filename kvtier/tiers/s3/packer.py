"""Gathering blocks into packs: which blocks go together, and when a pack is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvtier.tiers.base import StoredBlock

_LONGEST_DELAYS = 12


@dataclass(eq=False, slots=True)
class Window:
    """Consecutive blocks of one chain that will become one pack.

    Attributes:
        blocks: In the chain's order.
        begun: When the first block came, monotonic seconds.
        touched: When the last block came.
    """

    blocks: list[StoredBlock] = field(default_factory=list)
    begun: float = 0.0
    touched: float = 0.0

    def due(self, delay: float) -> float:
        """Return when to stop waiting for more: `delay` after the last block, twelve times that at most."""
        return min(self.touched + delay, self.begun + delay * _LONGEST_DELAYS)


class Packer:
    """Links blocks to windows by their parents' hashes; windows end at fixed positions of the chain.

    Chains that part within a window become windows of their own, each from where it parts. Blocks may come
    in any order. Not thread-safe: the uploader's lock guards it.
    """

    def __init__(self, window_blocks: int, is_kept: Callable[[bytes], bool]):
        """Make an empty packer.

        Args:
            window_blocks: Blocks of a whole pack, a power of two.
            is_kept: Tells whether a block is stored, or in another window or pack on its way.
        """
        self._window_blocks = window_blocks
        self._is_kept = is_kept
        self._by_last: dict[bytes, Window] = {}
        self._by_parent: dict[bytes, Window] = {}
        self._open: dict[Window, None] = {}

    def __bool__(self) -> bool:
        return bool(self._open)

    def add(self, block: StoredBlock, now: float) -> list[StoredBlock] | None:
        """Put one block into its window.

        Returns:
            The window's blocks if that completed it.
        """
        window = None
        if block.position % self._window_blocks:
            window = self._by_last.get(block.parent)
        if window is not None:
            self._unlink(window)
        else:
            window = Window(begun=now)
        window.blocks.append(block)
        if (block.position + 1) % self._window_blocks:
            follower = self._by_parent.get(block.hash)
            if follower is not None:
                self._unlink(follower)
                window.blocks += follower.blocks
                window.begun = min(window.begun, follower.begun)
        window.touched = now
        if self._is_complete(window):
            return window.blocks
        self._open[window] = None
        self._by_last[window.blocks[-1].hash] = window
        self._by_parent[window.blocks[0].parent] = window
        return None

    def take_due(self, now: float, delay: float) -> list[list[StoredBlock]]:
        """Take out the windows that have waited long enough; see `Window.due`. With a delay of 0 all."""
        due = [window for window in self._open if window.due(delay) <= now]
        for window in due:
            self._unlink(window)
        return [window.blocks for window in due]

    def next_due(self, delay: float) -> float | None:
        """Return when the next window will have waited long enough, None if none is open."""
        return min((window.due(delay) for window in self._open), default=None)

    def _is_complete(self, window: Window) -> bool:
        first, last = window.blocks[0], window.blocks[-1]
        if (last.position + 1) % self._window_blocks:
            return False
        return first.position % self._window_blocks == 0 or self._is_kept(first.parent)

    def _unlink(self, window: Window) -> None:
        del self._open[window]
        first, last = window.blocks[0], window.blocks[-1]
        del self._by_last[last.hash]
        if self._by_parent.get(first.parent) is window:
            del self._by_parent[first.parent]
