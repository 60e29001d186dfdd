"""The arena: one anonymous, shareable stretch of host memory, cut into slots of one block each."""

from __future__ import annotations

import mmap
import os

from kvtier.errors import ConfigError

PAGE_BYTES = 4096
"""Slots start at multiples of this, so that each can be pinned, and read into with O_DIRECT."""


class Arena:
    """Slots of equal size in one anonymous memfd.

    The memory has no name in any file system: its descriptor can be passed to other processes over a Unix
    socket, no /dev/shm limit applies, and nothing is left behind by SIGKILL. The kernel provides each page
    when it is first touched.

    Attributes:
        slots: How many slots there are.
        slot_bytes: Usable bytes of a slot.
        slot_stride: Bytes from the start of one slot to the start of the next, a multiple of 4096.
        fd: The memfd; -1 once closed.
    """

    def __init__(self, capacity_bytes: int, slot_bytes: int) -> None:
        """Map an arena of as many whole slots as `capacity_bytes` holds.

        Raises:
            ConfigError: `capacity_bytes` does not hold one slot.
            OSError: The kernel refuses the memory.
        """
        if slot_bytes < 1:
            raise ConfigError(f"a slot needs at least one byte, got {slot_bytes}")
        self.slot_bytes = slot_bytes
        self.slot_stride = -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES
        self.slots = capacity_bytes // self.slot_stride
        if self.slots < 1:
            raise ConfigError(
                f"a memory tier of {capacity_bytes} bytes does not hold one block: a slot takes"
                f" {self.slot_stride} bytes ({slot_bytes} rounded up to whole pages)"
            )
        length = self.slots * self.slot_stride
        self.fd = os.memfd_create("kvtier-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.fd, length)
            self._map = mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(self.fd)
            raise
        self._view = memoryview(self._map)

    def view(self, slot: int) -> memoryview:
        """Return the bytes of one slot, writable, `slot_bytes` long.

        Raises:
            IndexError: There is no such slot.
            ValueError: The arena is closed.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        start = slot * self.slot_stride
        return self._view[start : start + self.slot_bytes]

    def buffer(self) -> memoryview:
        """Return the whole arena, `slots * slot_stride` bytes, page-aligned, for pinning.

        Raises:
            ValueError: The arena is closed.
        """
        return self._view[:]

    def close(self) -> None:
        """Close the descriptor and let go of the mapping; a second call does nothing.

        Views that were handed out stay valid: while there are any, the memory lives on, and the last
        one to go frees it.
        """
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            # Somebody still holds a view, which keeps the mapping alive: it goes with that view.
            del self._map
