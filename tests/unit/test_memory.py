"""The memory tier: slots, tickets, pins, eviction and the arena under it."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import random
import socket
import subprocess
import sys
import threading

import pytest

from kvtier.errors import ConfigError
from kvtier.tiers import StoredBlock
from kvtier.tiers.memory import MemoryTier

SLOT_BYTES = 1000
STRIDE = 4096


def block_hash(number: int) -> bytes:
    return number.to_bytes(16, "big")


def hashes(*numbers: int) -> list[bytes]:
    return [block_hash(number) for number in numbers]


def filled(slots: int, *numbers: int) -> MemoryTier:
    """Return a tier of `slots` slots that holds these blocks, published one by one."""
    tier = MemoryTier(slots * STRIDE, SLOT_BYTES)
    for number in numbers:
        add(tier, number)
    return tier


def add(tier: MemoryTier, number: int) -> int:
    (ticket,) = tier.reserve([block_hash(number)])
    assert ticket is not None
    tier.view(ticket & 0xFFFFFFFF)[:] = bytes([number]) * SLOT_BYTES
    assert tier.publish([ticket]) == [True]
    return ticket


def present(tier: MemoryTier, *numbers: int) -> list[int]:
    return [number for number in numbers if tier.state(block_hash(number)) == "ready"]


class TestArena:
    def test_rounds_slots_up_to_pages(self) -> None:
        tier = MemoryTier(10 * STRIDE + 4095, SLOT_BYTES)
        assert (tier.slots, tier.slot_bytes, tier.slot_stride) == (10, SLOT_BYTES, STRIDE)
        assert len(tier.buffer()) == 10 * STRIDE
        assert len(tier.view(9)) == SLOT_BYTES

    def test_names_both_numbers_when_nothing_fits(self) -> None:
        with pytest.raises(ConfigError, match=r"4095 bytes.* 4096 bytes"):
            MemoryTier(4095, 4096)

    @pytest.mark.parametrize("slot_bytes", [0, -1])
    def test_refuses_empty_slots(self, slot_bytes: int) -> None:
        with pytest.raises(ConfigError, match=str(slot_bytes)):
            MemoryTier(1 << 20, slot_bytes)

    def test_is_page_aligned_and_not_inherited(self) -> None:
        tier = MemoryTier(4 * STRIDE, SLOT_BYTES)
        assert ctypes.addressof(ctypes.c_char.from_buffer(tier.buffer())) % 4096 == 0
        assert fcntl.fcntl(tier.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC

    def test_views_do_not_overlap(self) -> None:
        tier = MemoryTier(8 * STRIDE, STRIDE)
        for slot in range(8):
            tier.view(slot)[:] = bytes([slot + 1]) * STRIDE
        assert all(bytes(tier.view(slot)) == bytes([slot + 1]) * STRIDE for slot in range(8))

    @pytest.mark.parametrize("slot", [-1, 4])
    def test_has_no_slots_beyond_its_own(self, slot: int) -> None:
        with pytest.raises(IndexError):
            MemoryTier(4 * STRIDE, SLOT_BYTES).view(slot)

    def test_is_shared_through_its_descriptor(self) -> None:
        tier = filled(4, 7)
        here, there = socket.socketpair()
        reader = (
            "import mmap, socket, sys\n"
            "channel = socket.socket(fileno=int(sys.argv[1]))\n"
            "_, (fd,), _, _ = socket.recv_fds(channel, 1, 1)\n"
            "arena = mmap.mmap(fd, int(sys.argv[2]))\n"
            "print(set(arena[:1000]))\n"
            "arena[1] = 99\n"
        )
        with here, there:
            arguments = [sys.executable, "-c", reader, str(there.fileno()), str(4 * STRIDE)]
            with subprocess.Popen(
                arguments, pass_fds=[there.fileno()], stdout=subprocess.PIPE, text=True
            ) as child:
                socket.send_fds(here, [b"x"], [tier.fd])
                output, _ = child.communicate(timeout=60)
        assert output.strip() == "{7}"
        assert tier.view(0)[1] == 99

    def test_views_outlive_the_tier(self) -> None:
        tier = filled(4, 7)
        descriptor, view = tier.fd, tier.view(0)
        tier.close()
        assert tier.fd == -1
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(descriptor)
        with pytest.raises(ValueError, match="released"):
            tier.view(0)
        del tier
        gc.collect()
        assert bytes(view) == b"\x07" * SLOT_BYTES

    @pytest.mark.parametrize("keep_view", [False, True])
    def test_memory_goes_with_the_last_view(self, keep_view: bool) -> None:
        def mapped() -> int:
            with open("/proc/self/maps") as maps:
                return sum("kvtier-arena" in line for line in maps)

        before = mapped()
        tier = filled(4, 7)
        view = tier.view(0) if keep_view else None
        assert mapped() == before + 1
        tier.close()
        assert mapped() == before + (1 if keep_view else 0)
        del view
        assert mapped() == before


class TestTickets:
    def test_reserved_blocks_are_not_found_before_they_are_published(self) -> None:
        tier = MemoryTier(4 * STRIDE, SLOT_BYTES)
        (ticket,) = tier.reserve(hashes(1))
        assert ticket is not None
        assert tier.state(block_hash(1)) == "filling"
        assert tier.match(hashes(1)) == 0
        assert tier.acquire(hashes(1)) == []
        assert tier.publish([ticket]) == [True]
        assert tier.state(block_hash(1)) == "ready"
        assert tier.acquire(hashes(1)) == [ticket & 0xFFFFFFFF]

    def test_no_second_ticket_for_a_block(self) -> None:
        tier = MemoryTier(4 * STRIDE, SLOT_BYTES)
        first, second, again = tier.reserve(hashes(1, 2, 1))
        assert first is not None
        assert second is not None
        assert again is None
        assert tier.reserve(hashes(2, 1)) == [None, None]
        tier.publish([first, second])
        assert tier.reserve(hashes(2, 1)) == [None, None]

    def test_tickets_work_once(self) -> None:
        tier = MemoryTier(1 * STRIDE, SLOT_BYTES)
        ticket = add(tier, 1)
        assert tier.publish([ticket]) == [False]
        tier.abort([ticket])
        assert tier.state(block_hash(1)) == "ready"

    def test_a_stale_ticket_does_not_touch_the_slot_s_next_block(self) -> None:
        tier = MemoryTier(1 * STRIDE, SLOT_BYTES)
        (old,) = tier.reserve(hashes(1))
        assert old is not None
        tier.abort([old])
        (new,) = tier.reserve(hashes(2))
        assert new is not None
        assert new & 0xFFFFFFFF == old & 0xFFFFFFFF
        assert tier.publish([old]) == [False]
        tier.abort([old])
        assert tier.state(block_hash(2)) == "filling"
        assert tier.publish([new]) == [True]

    @pytest.mark.parametrize("ticket", [0, -1, 1, 0xFFFFFFFF, 1 << 32, (5 << 32) | 3, 1 << 70])
    def test_foreign_tickets_have_no_effect(self, ticket: int) -> None:
        tier = MemoryTier(2 * STRIDE, SLOT_BYTES)
        assert tier.publish([ticket]) == [False]
        tier.abort([ticket])
        assert tier.stats()["free"] == 2

    def test_tickets_fit_into_a_signed_word(self) -> None:
        tier = MemoryTier(1 * STRIDE, SLOT_BYTES)
        tier._generation = 0x7FFFFFFE
        tickets = []
        for number in range(3):
            (ticket,) = tier.reserve([block_hash(number)])
            assert ticket is not None
            tier.abort([ticket])
            tickets.append(ticket)
        assert len(set(tickets)) == 3
        assert all(0 < ticket < 1 << 63 for ticket in tickets)

    def test_publish_pins_before_anybody_can_evict(self) -> None:
        tier = MemoryTier(1 * STRIDE, SLOT_BYTES)
        (ticket,) = tier.reserve(hashes(1))
        assert ticket is not None
        tier.publish([ticket], pin=True)
        assert tier.reserve(hashes(2)) == [None]
        tier.unpin([ticket & 0xFFFFFFFF])
        assert tier.reserve(hashes(2)) != [None]

    def test_a_block_discarded_while_it_is_filled_is_not_published(self) -> None:
        tier = MemoryTier(2 * STRIDE, SLOT_BYTES)
        (ticket,) = tier.reserve(hashes(1))
        assert ticket is not None
        tier.discard(hashes(1))
        assert tier.state(block_hash(1)) == "absent"
        assert tier.stats()["free"] == 1, "somebody still writes to its slot"
        (again,) = tier.reserve(hashes(1))
        assert again is not None
        assert tier.publish([ticket, again]) == [False, True]
        assert tier.acquire(hashes(1)) == [again & 0xFFFFFFFF]
        assert tier.stats()["free"] == 1

    def test_a_block_discarded_while_it_is_filled_can_be_aborted(self) -> None:
        tier = MemoryTier(1 * STRIDE, SLOT_BYTES)
        (ticket,) = tier.reserve(hashes(1))
        assert ticket is not None
        tier.discard(hashes(1))
        tier.abort([ticket])
        assert tier.stats()["free"] == 1


class TestPins:
    def test_acquire_takes_the_leading_run(self) -> None:
        tier = filled(8, 1, 2, 4)
        assert len(tier.acquire(hashes(1, 2, 3, 4))) == 2
        assert tier.acquire(hashes(3, 1)) == []
        assert tier.stats()["pinned"] == 2

    def test_pinned_blocks_are_not_evicted(self) -> None:
        tier = filled(2, 1, 2)
        slots = tier.acquire(hashes(1, 2))
        assert tier.reserve(hashes(3)) == [None]
        assert tier.stats()["full"] == 1
        tier.unpin(slots[:1])
        (ticket,) = tier.reserve(hashes(3))
        assert ticket is not None
        assert ticket & 0xFFFFFFFF == slots[0]
        assert present(tier, 1, 2) == [2]

    def test_every_pin_counts(self) -> None:
        tier = filled(1, 1)
        first, second = tier.acquire(hashes(1)), tier.acquire(hashes(1, 1))
        assert len(second) == 2
        tier.unpin(first)
        tier.unpin(second[:1])
        assert tier.reserve(hashes(2)) == [None]
        tier.unpin(second[1:])
        assert tier.reserve(hashes(2)) != [None]

    def test_a_pin_given_back_twice_is_not_somebody_else_s(self) -> None:
        tier = filled(1, 1)
        slots = tier.acquire(hashes(1))
        tier.unpin(slots)
        tier.unpin(slots)
        assert tier.stats()["misuse"] == 1
        tier.acquire(hashes(1))
        assert tier.reserve(hashes(2)) == [None]

    def test_a_discarded_block_keeps_its_bytes_while_it_is_pinned(self) -> None:
        tier = filled(1, 7)
        slots = tier.acquire(hashes(7))
        tier.discard(hashes(7))
        assert tier.state(block_hash(7)) == "absent"
        assert tier.reserve(hashes(7)) == [None]
        assert bytes(tier.view(slots[0])) == b"\x07" * SLOT_BYTES
        tier.unpin(slots)
        assert tier.stats()["free"] == 1
        assert tier.reserve(hashes(7)) != [None]

    def test_pins_may_be_given_back_after_close(self) -> None:
        tier = filled(2, 1)
        slots = tier.acquire(hashes(1))
        (ticket,) = tier.reserve(hashes(2))
        assert ticket is not None
        tier.close()
        tier.unpin(slots)
        assert tier.publish([ticket], pin=True) == [False]
        tier.abort([ticket])
        assert tier.reserve(hashes(3)) == [None]
        assert tier.acquire(hashes(1)) == []


class TestEviction:
    def test_the_least_recently_used_goes_first(self) -> None:
        tier = filled(3, 1, 2, 3)
        tier.unpin(tier.acquire(hashes(1)))
        add(tier, 4)
        assert present(tier, 1, 2, 3, 4) == [1, 3, 4]

    def test_asking_for_a_slot_counts_as_use(self) -> None:
        tier = filled(3, 1, 2, 3)
        tier.reserve(hashes(1, 2))
        add(tier, 4)
        assert present(tier, 1, 2, 3, 4) == [1, 2, 4]
        add(tier, 5)
        assert present(tier, 1, 2, 4, 5) == [1, 4, 5]

    def test_asking_twice_in_one_call_changes_no_order(self) -> None:
        tier = filled(2, 1, 2)
        tier.reserve(hashes(1, 2, 1))
        add(tier, 3)
        assert present(tier, 1, 2, 3) == [1, 3]

    def test_the_tail_of_a_chain_goes_before_its_head(self) -> None:
        tier = filled(4, 4)
        tickets = [ticket for ticket in tier.reserve(hashes(1, 2, 3)) if ticket is not None]
        tier.publish(tickets)
        tier.unpin(tier.acquire(hashes(4)))
        add(tier, 5)
        assert present(tier, 1, 2, 3) == [1, 2]
        tier.unpin(tier.acquire(hashes(1, 2)))
        add(tier, 6)
        add(tier, 7)
        assert present(tier, 1, 2, 4, 5) == [1, 2]
        add(tier, 8)
        assert present(tier, 1, 2) == [1]

    def test_blocks_are_not_evicted_for_others_of_the_same_call(self) -> None:
        tier = filled(2, 1, 2)
        assert tier.reserve(hashes(1, 2, 3)) == [None, None, None]
        assert present(tier, 1, 2) == [1, 2]
        first, new = tier.reserve(hashes(1, 3))
        assert first is None
        assert new is not None
        assert present(tier, 1, 2) == [1]

    def test_blocks_being_filled_are_not_evicted(self) -> None:
        tier = MemoryTier(2 * STRIDE, SLOT_BYTES)
        assert None not in tier.reserve(hashes(1, 2))
        assert tier.reserve(hashes(3)) == [None]
        assert tier.state(block_hash(1)) == "filling"


class TestPayloads:
    @pytest.mark.parametrize("length", [0, SLOT_BYTES - 1, SLOT_BYTES + 1])
    def test_payloads_of_another_size_are_refused(self, length: int) -> None:
        tier = MemoryTier(4 * STRIDE, SLOT_BYTES)
        blocks = [
            StoredBlock(block_hash(1), bytes(16), 0, bytes(length)),
            StoredBlock(block_hash(2), bytes(16), 1, bytes(SLOT_BYTES)),
        ]
        assert tier.write(blocks) == 1
        assert present(tier, 1, 2) == [2]
        assert tier.stats()["misuse"] == 1
        assert tier.stats()["filling"] == 0

    def test_a_reader_cannot_write(self) -> None:
        tier = filled(1, 1)
        readonly: list[bool] = []
        tier.read(hashes(1), lambda _, payload: readonly.append(memoryview(payload or b"").readonly))
        assert readonly == [True]

    def test_a_block_is_pinned_while_it_is_delivered(self) -> None:
        tier = filled(1, 1)
        outcomes: list[list[int | None]] = []
        tier.read(hashes(1), lambda _, payload: outcomes.append(tier.reserve(hashes(2))))
        assert outcomes == [[None]]
        assert tier.stats()["pinned"] == 0


def test_threads_never_see_a_block_change() -> None:
    """Writers churn through a small arena while readers check what they have pinned."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    tier = MemoryTier(16 * STRIDE, SLOT_BYTES)
    wrong: list[str] = []

    def content(number: int) -> bytes:
        return number.to_bytes(4, "big") * (SLOT_BYTES // 4)

    def work(worker: int) -> None:
        source = random.Random(seed + worker)
        for _ in range(400):
            wanted = [source.randrange(40) for _ in range(4)]
            for number, ticket in zip(wanted, tier.reserve(hashes(*wanted)), strict=True):
                if ticket is not None:
                    tier.view(ticket & 0xFFFFFFFF)[:] = content(number)
                    if source.random() < 0.1:
                        tier.abort([ticket])
                    else:
                        tier.publish([ticket])
            slots = tier.acquire(hashes(*wanted))
            wrong.extend(
                f"slot {slot}, block {number}, worker {worker}"
                for number, slot in zip(wanted, slots, strict=False)
                if tier.view(slot) != content(number)
            )
            tier.unpin(slots)
            if source.random() < 0.1:
                tier.discard(hashes(wanted[0]))

    workers = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    stats = tier.stats()
    assert (stats["pinned"], stats["filling"], stats["misuse"]) == (0, 0, 0)
    assert stats["free"] + stats["blocks"] == 16
    assert stats["evictions"] > 0
