"""The memory tier: blocks in the slots of an arena, and the one owner of every slot's state."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from kvtier._logging import log_once
from kvtier.tiers.arena import Arena, ArenaPart, MappedMemory
from kvtier.tiers.base import Deliver, StoredBlock

_logger = logging.getLogger(__name__)

SlotState = Literal["absent", "filling", "ready"]

_SLOT_MASK = 0xFFFFFFFF
_GENERATIONS = 0x7FFFFFFF


class MemoryTier:
    """Blocks in host memory, evicted least recently used first.

    A slot is free, filling (somebody holds a ticket and writes into it) or ready (findable by its block's
    hash). Pins count the readers of a ready slot; only ready slots without pins are evicted. A discarded
    block that is pinned, or still being filled, can no longer be found, and its slot becomes free when the
    last pin or the ticket goes.

    Blocks used in one call count as used last to first: of one chain the tail is evicted before the head,
    without which it would be useless.

    The slots may also be a changing part of memory that several tiers share (`within`, `grow`, `shrink`).

    Payloads are slots of exactly `slot_bytes`. All methods are thread-safe and short: none copies
    blocks under the lock, and `read` and `write` alone copy or wait at all.

    Attributes:
        name: "memory".
        slots: How many slots there are at present.
        slot_bytes: Usable bytes of a slot.
        slot_stride: Bytes from one slot to the next, `slot_bytes` rounded up to 4096.
    """

    name = "memory"

    def __init__(self, capacity_bytes: int, slot_bytes: int) -> None:
        """Map an arena of as many slots as `capacity_bytes` holds.

        Raises:
            ConfigError: `capacity_bytes` does not hold one slot.
            OSError: The kernel refuses the memory.
        """
        self._set_up(Arena(capacity_bytes, slot_bytes))

    @classmethod
    def within(cls, memory: MappedMemory, slot_bytes: int) -> MemoryTier:
        """Make a tier without slots in memory that it shares; `grow` gives it slots.

        Raises:
            ConfigError: `slot_bytes` is not positive.
        """
        tier = cls.__new__(cls)
        tier._set_up(ArenaPart(memory, slot_bytes))
        return tier

    def _set_up(self, arena: Arena | ArenaPart) -> None:
        self._arena = arena
        self.slots = arena.slots
        self.slot_bytes = arena.slot_bytes
        self.slot_stride = arena.slot_stride
        self._lock = threading.Lock()
        self._closed = False
        self._free = list(range(self.slots - 1, -1, -1))
        self._ready: dict[bytes, int] = {}
        self._filling: dict[bytes, int] = {}
        # Ready slots without pins, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()
        # Slots with pins, and how many.
        self._pins: dict[int, int] = {}
        # The hash that a slot can be found by, or will be; free and discarded slots have none.
        self._hash: dict[int, bytes] = {}
        self._ticket: dict[int, int] = {}
        self._generation = 0
        self._owned = set(range(self.slots))
        # Slots that are to be given back, and those that nobody uses any more.
        self._leaving: set[int] = set()
        self._left: list[int] = []
        self._counts = dict.fromkeys(("hits", "misses", "writes", "evictions", "full", "misuse"), 0)

    @property
    def fd(self) -> int:
        """The arena's memfd, to be passed to the processes that map it; -1 once closed."""
        return self._arena.fd

    def view(self, slot: int) -> memoryview:
        """Return the bytes of `slot`, writable, `slot_bytes` long.

        Only the holder of its ticket may write to a slot, and only who has pinned it may rely on its bytes.

        Raises:
            IndexError: There is no such slot.
            ValueError: The tier is closed.
        """
        return self._arena.view(slot)

    def buffer(self) -> memoryview:
        """Return the whole arena, page-aligned, for pinning.

        Raises:
            ValueError: The tier is closed.
        """
        return self._arena.buffer()

    def state(self, block_hash: bytes) -> SlotState:
        """Say whether a block is ready, being filled, or absent."""
        with self._lock:
            if block_hash in self._ready:
                return "ready"
            return "filling" if block_hash in self._filling else "absent"

    def ready(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return which blocks are ready."""
        with self._lock:
            return {block_hash for block_hash in hashes if block_hash in self._ready}

    def acquire(self, hashes: Sequence[bytes]) -> list[int]:
        """Pin the longest leading run of ready blocks, each once for every time that it is named.

        Returns:
            Their slots, in order. Each is to be given back through `unpin`, once.
        """
        slots: list[int] = []
        pins, idle = self._pins, self._idle
        with self._lock:
            ready = self._ready
            for block_hash in hashes:
                slot = ready.get(block_hash)
                if slot is None:
                    break
                held = pins.get(slot, 0)
                if not held:
                    del idle[slot]
                pins[slot] = held + 1
                slots.append(slot)
            self._counts["hits"] += len(slots)
            self._counts["misses"] += len(hashes) - len(slots)
        return slots

    def unpin(self, slots: Iterable[int]) -> None:
        """Give pins back; blocks without any pin left are from now on the most recently used ones."""
        pins = self._pins
        released: list[int] = []
        with self._lock:
            for slot in slots:
                held = pins.get(slot, 0)
                if held > 1:
                    pins[slot] = held - 1
                elif held:
                    del pins[slot]
                    released.append(slot)
                else:
                    self._counts["misuse"] += 1
            for slot in reversed(released):
                if slot in self._hash:
                    self._idle[slot] = None
                else:
                    self._release(slot)

    def reserve(self, hashes: Sequence[bytes]) -> list[int | None]:
        """Reserve a slot for each block that is neither ready nor being filled.

        Ready blocks among `hashes` become the most recently used ones, and none of them is evicted to make
        room for the others.

        Returns:
            For each hash a ticket (generation << 32 | slot), to be given to `publish` or `abort`; or None
            where none is needed or no slot can be had.
        """
        tickets: list[int | None] = []
        ready, filling, idle = self._ready, self._filling, self._idle
        with self._lock:
            if self._closed:
                return [None] * len(hashes)
            self._generation = self._generation % _GENERATIONS + 1
            found = dict.fromkeys(map(ready.get, hashes))
            asked = [slot for slot in found if slot is not None and slot in idle]
            for slot in asked:
                idle.pop(slot, None)
            for block_hash in hashes:
                if block_hash in ready or block_hash in filling:
                    tickets.append(None)
                    continue
                taken = self._take()
                if taken is None:
                    self._counts["full"] += 1
                    tickets.append(None)
                    continue
                ticket = self._generation << 32 | taken
                self._ticket[taken] = ticket
                self._hash[taken] = block_hash
                filling[block_hash] = taken
                tickets.append(ticket)
            for slot in reversed(asked):
                idle[slot] = None
        return tickets

    def publish(self, tickets: Sequence[int], pin: bool = False) -> list[bool]:
        """Make filled slots findable; with `pin` each is pinned once, before anybody else can see it.

        Returns:
            For each ticket whether its block is now ready. False for a stale ticket, which has no effect,
            and for a block that was discarded meanwhile, whose slot becomes free.
        """
        published: list[bool] = []
        fresh: list[int] = []
        with self._lock:
            for ticket in tickets:
                slot = self._redeem(ticket)
                block_hash = self._hash.get(slot) if slot is not None else None
                published.append(block_hash is not None)
                if slot is None:
                    continue
                if block_hash is None:
                    self._release(slot)
                    continue
                del self._filling[block_hash]
                self._ready[block_hash] = slot
                if pin:
                    self._pins[slot] = 1
                else:
                    fresh.append(slot)
            for slot in reversed(fresh):
                self._idle[slot] = None
            self._counts["writes"] += sum(published)
        return published

    def abort(self, tickets: Iterable[int]) -> None:
        """Give reservations up: their slots become free. Stale tickets are ignored."""
        with self._lock:
            for ticket in tickets:
                slot = self._redeem(ticket)
                if slot is None:
                    continue
                self._filling.pop(self._hash.get(slot, b""), None)
                self._release(slot)

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Make blocks unfindable, whether ready or being filled."""
        with self._lock:
            for block_hash in hashes:
                self._discard(block_hash)

    def grow(self, slots: Sequence[int]) -> None:
        """Take over slots of the shared memory, which nobody else uses."""
        with self._lock:
            self._free.extend(reversed(slots))
            self._owned.update(slots)
            self.slots = len(self._owned)

    def shrink(self, slots: int) -> None:
        """Give back all but `slots` slots, those that lie highest in the memory, and forget their blocks.

        What is pinned or being filled leaves when the last pin or the ticket goes; see `take_left`.
        """
        with self._lock:
            surplus = sorted(self._owned)[slots:]
            self._owned.difference_update(surplus)
            self.slots = len(self._owned)
            self._leaving.update(surplus)
            for slot in surplus:
                block_hash = self._hash.get(slot)
                if block_hash is not None:
                    self._discard(block_hash)
            free, self._free = self._free, []
            for slot in free:
                self._release(slot)

    @property
    def leaving(self) -> int:
        """How many slots are still to leave."""
        return len(self._leaving) + len(self._left)

    def take_left(self) -> list[int]:
        """Return the slots that left since the last call: nobody reads or writes them through this tier."""
        with self._lock:
            left, self._left = self._left, []
            return left

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return the length of the longest leading run of ready blocks."""
        count = 0
        with self._lock:
            for block_hash in hashes:
                if block_hash not in self._ready:
                    break
                count += 1
        return count

    def read(self, hashes: Sequence[bytes], deliver: Deliver) -> None:
        """Hand each block's slot to `deliver`, read-only and pinned during the call; None for a miss."""
        for block_hash in hashes:
            slots = self.acquire((block_hash,))
            payload: memoryview | None = None
            if slots:
                try:
                    payload = self.view(slots[0]).toreadonly()
                except ValueError:
                    log_once(_logger, "closed", "the memory tier was closed while it was being read")
            try:
                deliver(block_hash, payload)
            except Exception as error:  # noqa: BLE001 - one receiver's defect must not cost the others their blocks
                log_once(_logger, "deliver", "a receiver of blocks raised %r", error)
            finally:
                self.unpin(slots)

    def write(self, blocks: Sequence[StoredBlock]) -> int:
        """Copy blocks into slots; those ready already, and those not of exactly `slot_bytes`, are skipped."""
        fitting = [block for block in blocks if memoryview(block.payload).nbytes == self.slot_bytes]
        payloads = [memoryview(block.payload).cast("B") for block in fitting]
        tickets = self.reserve([block.hash for block in fitting])
        filled: list[int] = []
        try:
            for payload, ticket in zip(payloads, tickets, strict=True):
                if ticket is not None:
                    self.view(ticket & _SLOT_MASK)[:] = payload
                    filled.append(ticket)
        except ValueError:
            log_once(_logger, "closed", "the memory tier was closed while it was being written to")
        self.publish(filled)
        with self._lock:
            self._counts["misuse"] += len(blocks) - len(fitting)
            return sum(block.hash in self._ready for block in fitting)

    def flush(self, timeout: float) -> bool:
        """Do nothing: what `write` has returned from is visible, and nothing here is durable."""
        return True

    def stats(self) -> Mapping[str, int | float]:
        """Return counters, and gauges of the slots.

        `hits` and `misses` count blocks asked for by `acquire` and `read`; `full` reservations that found
        no slot; `misuse` pins given back twice and payloads of a wrong size.
        """
        with self._lock:
            return {
                **self._counts,
                "blocks": len(self._ready),
                "filling": len(self._ticket),
                "pinned": len(self._pins),
                "free": len(self._free),
                "slots": self.slots,
                "size_bytes": len(self._ready) * self.slot_stride,
                "capacity_bytes": self.slots * self.slot_stride,
            }

    def close(self, timeout: float = 10.0) -> None:
        """Forget all blocks and free the arena; a second call does nothing.

        Views that were handed out stay valid, and keep the memory until they are gone.
        """
        with self._lock:
            self._closed = True
            for known in (self._free, self._ready, self._filling, self._idle, self._hash):
                known.clear()
        self._arena.close()

    def _take(self) -> int | None:
        """Return a free slot, evicting the least recently used idle block if there is none."""
        if self._free:
            return self._free.pop()
        if not self._idle:
            return None
        slot, _ = self._idle.popitem(last=False)
        del self._ready[self._hash.pop(slot)]
        self._counts["evictions"] += 1
        return slot

    def _redeem(self, ticket: int) -> int | None:
        """Return the slot of a valid ticket, which is used up by this; None for a stale one."""
        slot = ticket & _SLOT_MASK
        if self._ticket.get(slot) != ticket:
            return None
        del self._ticket[slot]
        return slot

    def _discard(self, block_hash: bytes) -> None:
        slot = self._ready.pop(block_hash, None)
        if slot is not None:
            del self._hash[slot]
            if slot not in self._pins:
                del self._idle[slot]
                self._release(slot)
            return
        self._hash.pop(self._filling.pop(block_hash, -1), None)

    def _release(self, slot: int) -> None:
        """Make a slot free that nobody can find, pins or fills."""
        self._hash.pop(slot, None)
        if slot in self._leaving:
            self._leaving.remove(slot)
            self._left.append(slot)
        else:
            self._free.append(slot)
