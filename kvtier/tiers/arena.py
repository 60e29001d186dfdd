"""The arena: anonymous, shareable host memory, and slots of one block each in it."""

from __future__ import annotations

import mmap
import os

from kvtier.errors import ConfigError

PAGE_BYTES = 4096
"""Slots start at multiples of this, so that each can be pinned, and read into with O_DIRECT."""


def stride(slot_bytes: int) -> int:
    """Return the bytes from the start of one slot to the start of the next: whole pages.

    Raises:
        ConfigError: `slot_bytes` is not positive.
    """
    if slot_bytes < 1:
        raise ConfigError(f"a slot needs at least one byte, got {slot_bytes}")
    return -(-slot_bytes // PAGE_BYTES) * PAGE_BYTES


class MappedMemory:
    """A memfd, mapped into this process.

    The memory has no name in any file system: its descriptor can be passed to other processes over a Unix
    socket, no /dev/shm limit applies, and nothing is left behind by SIGKILL. The kernel provides each page
    when it is first touched.

    Attributes:
        fd: The memfd; -1 once closed.
        length: Bytes.
    """

    def __init__(self, fd: int, length: int) -> None:
        """Map `length` bytes of `fd`, and take the descriptor over, also when this fails.

        Raises:
            OSError: The kernel refuses.
            ValueError: The memfd is shorter than that.
        """
        self.fd = fd
        self.length = length
        try:
            self._map = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except BaseException:
            os.close(fd)
            raise
        self._view = memoryview(self._map)

    @classmethod
    def anonymous(cls, length: int) -> MappedMemory:
        """Make a memfd of `length` bytes and map it.

        Raises:
            OSError: The kernel refuses the memory.
        """
        fd = os.memfd_create("kvtier-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, length)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, length)

    def part(self, start: int, length: int) -> memoryview:
        """Return some of the bytes, writable.

        Raises:
            IndexError: They are not all within the memory.
            ValueError: The memory is closed.
        """
        if start < 0 or start + length > self.length:
            raise IndexError(f"bytes {start} to {start + length} of {self.length}")
        return self._view[start : start + length]

    def buffer(self) -> memoryview:
        """Return the whole memory, page-aligned, for pinning.

        Raises:
            ValueError: The memory is closed.
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


class Arena:
    """Slots of equal size in memory of their own, numbered from 0.

    Attributes:
        slots: How many slots there are.
        slot_bytes: Usable bytes of a slot.
        slot_stride: Bytes from the start of one slot to the start of the next, a multiple of 4096.
    """

    def __init__(self, capacity_bytes: int, slot_bytes: int) -> None:
        """Map an arena of as many whole slots as `capacity_bytes` holds.

        Raises:
            ConfigError: `capacity_bytes` does not hold one slot.
            OSError: The kernel refuses the memory.
        """
        self.slot_bytes = slot_bytes
        self.slot_stride = stride(slot_bytes)
        self.slots = capacity_bytes // self.slot_stride
        if self.slots < 1:
            raise ConfigError(
                f"a memory tier of {capacity_bytes} bytes does not hold one block: a slot takes"
                f" {self.slot_stride} bytes ({slot_bytes} rounded up to whole pages)"
            )
        self._memory = MappedMemory.anonymous(self.slots * self.slot_stride)

    @property
    def fd(self) -> int:
        """The memfd; -1 once closed."""
        return self._memory.fd

    def view(self, slot: int) -> memoryview:
        """Return the bytes of one slot, writable, `slot_bytes` long.

        Raises:
            IndexError: There is no such slot.
            ValueError: The arena is closed.
        """
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        return self._memory.part(slot * self.slot_stride, self.slot_bytes)

    def buffer(self) -> memoryview:
        """Return the whole arena, `slots * slot_stride` bytes, page-aligned, for pinning.

        Raises:
            ValueError: The arena is closed.
        """
        return self._memory.buffer()

    def close(self) -> None:
        """Free the memory, once no view of it is left; a second call does nothing."""
        self._memory.close()


class ArenaPart:
    """Slots somewhere in memory that others use too; a slot's number is that of its first page.

    Attributes:
        slots: 0: which slots belong to the part is not known here.
        slot_bytes: Usable bytes of a slot.
        slot_stride: Bytes that a slot takes, a multiple of 4096.
    """

    slots = 0

    def __init__(self, memory: MappedMemory, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.slot_stride = stride(slot_bytes)
        self._memory = memory
        self._closed = False

    @property
    def fd(self) -> int:
        """The memfd of the whole memory; -1 once closed."""
        return -1 if self._closed else self._memory.fd

    def view(self, slot: int) -> memoryview:
        """Return the bytes of one slot, writable, `slot_bytes` long.

        Raises:
            IndexError: There is no such slot.
            ValueError: The part is closed.
        """
        if self._closed:
            raise ValueError("the arena is closed")
        return self._memory.part(slot * PAGE_BYTES, self.slot_bytes)

    def buffer(self) -> memoryview:
        """Return the whole memory, that of others too.

        Raises:
            ValueError: The memory is closed.
        """
        return self._memory.buffer()

    def close(self) -> None:
        """Hand out no more views; the memory itself belongs to others."""
        self._closed = True
