"""The arenas that a client has mapped: the present one, and those that copies may still be reading."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.agent.epochs import split
from kvtier.tiers.arena import PAGE_BYTES, MappedMemory

Prepare = Callable[[memoryview], Callable[[], None] | None]
"""Called with a whole arena before its first use, such as to pin it; what it returns is called when the arena
goes."""


@dataclass(eq=False, slots=True)
class _Mapped:
    memory: MappedMemory
    undo: Callable[[], None] | None


class Mappings:
    """Arenas by the epochs that lie in them.

    An agent that is started anew has a new arena. Blocks promised before lie in the old one, and are read
    from there: the memory lives as long as it is mapped, and with its agent dead nobody writes to it.

    Args:
        prepare: See `Prepare`.
        keep: Seconds for which an epoch that was replaced stays readable.
        clock: Monotonic seconds.
    """

    def __init__(self, prepare: Prepare | None, keep: float, clock: Callable[[], float]) -> None:
        self._prepare = prepare
        self._keep = keep
        self._clock = clock
        self._lock = threading.Lock()
        self._arenas: dict[int, _Mapped] = {}
        # Which arena each epoch lies in, and until when it is kept; the present one has no end.
        self._epochs: dict[int, tuple[int, float | None]] = {}
        self._memory_of: dict[int, MappedMemory] = {}

    def __len__(self) -> int:
        return len(self._arenas)

    def enter(self, epoch: int, arena: int, fd: int, length: int) -> None:
        """Make an epoch the present one; maps and prepares its arena unless it is known. Takes `fd` over.

        Raises:
            OSError: The kernel refuses to map it.
            ValueError: The descriptor is shorter than `length`.
        """
        known = self._arenas.get(arena)
        # Mapping takes over the descriptor, and preparing may take long: neither happens under the lock.
        memory = known.memory if known is not None else MappedMemory(fd, length)
        if known is not None:
            MappedMemory(fd, length).close()
        else:
            known = _Mapped(memory, self._prepared(memory))
        with self._lock:
            end = self._clock() + self._keep
            self._epochs = {
                other: (place, end if until is None else until)
                for other, (place, until) in self._epochs.items()
            }
            self._arenas[arena] = known
            self._epochs[epoch] = (arena, None)
            self._memory_of[epoch] = memory

    def _prepared(self, memory: MappedMemory) -> Callable[[], None] | None:
        try:
            return self._prepare(memory.buffer()) if self._prepare is not None else None
        except BaseException:
            memory.close()
            raise

    def view(self, slot: int, start: int, length: int) -> memoryview:
        """Return bytes `start` to `start + length` of a slot.

        Raises:
            ValueError: The slot's epoch is not mapped, or not any more.
            IndexError: There is no such slot.
        """
        epoch, place = split(slot)
        memory = self._memory_of.get(epoch)
        if memory is None:
            raise ValueError(f"slot {slot:#x} is of an arena that is not mapped")
        return memory.part(place * PAGE_BYTES + start, length)

    def drop_old(self) -> None:
        """Let go of what was replaced long enough ago."""
        now = self._clock()
        self._drop(
            [epoch for epoch, (_, until) in self._epochs.items() if until is not None and until <= now]
        )

    def close(self) -> None:
        """Let go of everything."""
        self._drop(list(self._epochs))

    def _drop(self, epochs: list[int]) -> None:
        with self._lock:
            for epoch in epochs:
                del self._epochs[epoch], self._memory_of[epoch]
            used = {place for place, _ in self._epochs.values()}
            unused = [self._arenas.pop(place) for place in list(self._arenas) if place not in used]
        for mapped in unused:
            if mapped.undo is not None:
                mapped.undo()
            mapped.memory.close()
