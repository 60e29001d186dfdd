"""What every tier must do: a tier's own tests subclass `TierSuite` and the mixins that fit."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvtier.tiers import Buffer, StoredBlock, Tier

FLUSH_SECONDS = 10.0


class TierSuite:
    """The sentences of the `Tier` protocol as tests.

    A subclass says how to make a tier, and what its payloads look like. The tier must have room for 200
    payloads. Tests flush after writing, so a tier that queues conforms as well.
    """

    def make_tier(self, place: Path) -> Tier:
        """Return a tier; for a persistent one, the one that lies at `place`."""
        raise NotImplementedError

    def payload(self, index: int) -> bytes:
        """Return the bytes of a block, different for each index."""
        raise NotImplementedError

    @pytest.fixture
    def open_tier(self, tmp_path: Path) -> Iterator[Callable[[], Tier]]:
        """Open the tier of this test, again and again if need be; all are closed at the end."""
        opened: list[Tier] = []

        def open_one() -> Tier:
            opened.append(self.make_tier(tmp_path / "tier"))
            return opened[-1]

        yield open_one
        for tier in opened:
            tier.close()

    @pytest.fixture
    def tier(self, open_tier: Callable[[], Tier]) -> Tier:
        return open_tier()

    def chain(self, count: int, name: str = "chain") -> list[StoredBlock]:
        """Return consecutive blocks of one chain, which `name` sets apart from others."""
        parent = hashlib.blake2b(name.encode(), digest_size=16).digest()
        blocks = []
        for position in range(count):
            block_hash = hashlib.blake2b(parent, digest_size=16).digest()
            blocks.append(StoredBlock(block_hash, parent, position, self.payload(position)))
            parent = block_hash
        return blocks

    def test_has_a_name(self, tier: Tier) -> None:
        assert re.fullmatch("[a-z0-9]+", tier.name)

    def test_knows_nothing_at_first(self, tier: Tier) -> None:
        hashes = hashes_of(self.chain(3))
        assert tier.match(hashes) == 0
        assert read(tier, hashes) == dict.fromkeys(hashes)

    def test_takes_empty_input(self, tier: Tier) -> None:
        assert tier.match([]) == 0
        assert tier.write([]) == 0
        tier.discard([])
        tier.read([], lambda block_hash, payload: pytest.fail("delivered something that nobody asked for"))

    def test_reads_back_what_was_written(self, tier: Tier) -> None:
        blocks = self.chain(20)
        assert write(tier, blocks) == 20
        assert tier.match(hashes_of(blocks)) == 20
        assert read(tier, hashes_of(blocks)) == contents_of(blocks)

    def test_matches_the_leading_run(self, tier: Tier) -> None:
        blocks = self.chain(8)
        hashes = hashes_of(blocks)
        write(tier, blocks[:5])
        assert tier.match(hashes) == 5
        assert tier.match(hashes[:3]) == 3
        assert tier.match(hashes[2:]) == 3
        assert tier.match(hashes[5:]) == 0

    def test_match_stops_at_a_hole(self, tier: Tier) -> None:
        blocks = self.chain(8)
        hashes = hashes_of(blocks)
        write(tier, blocks[:2] + blocks[3:])
        assert tier.match(hashes) == 2
        assert tier.match(hashes[2:]) == 0
        assert tier.match(hashes[3:]) == 5

    def test_reads_around_a_hole(self, tier: Tier) -> None:
        blocks = self.chain(8)
        write(tier, blocks[:2] + blocks[3:])
        assert read(tier, hashes_of(blocks)) == {**contents_of(blocks), blocks[2].hash: None}

    def test_unknown_hashes_are_misses(self, tier: Tier) -> None:
        blocks, strangers = self.chain(6), hashes_of(self.chain(6, "strangers"))
        write(tier, blocks)
        asked = [block_hash for pair in zip(strangers, hashes_of(blocks), strict=True) for block_hash in pair]
        assert read(tier, asked) == {**contents_of(blocks), **dict.fromkeys(strangers)}

    def test_delivers_once_for_every_time_that_a_hash_is_named(self, tier: Tier) -> None:
        first, second = self.chain(2)
        stranger = bytes(16)
        write(tier, [first, second])
        delivered = read_all(tier, [first.hash, second.hash, first.hash, stranger, stranger])
        assert sorted(block_hash for block_hash, _ in delivered) == sorted(
            [first.hash, second.hash, first.hash, stranger, stranger]
        )
        known = {first.hash: bytes(first.payload), second.hash: bytes(second.payload), stranger: None}
        assert all(payload == known[block_hash] for block_hash, payload in delivered)

    def test_an_exception_of_a_receiver_stops_no_other(self, tier: Tier) -> None:
        blocks = self.chain(12)
        write(tier, blocks)
        delivered: list[bytes] = []

        def deliver(block_hash: bytes, payload: Buffer | None) -> None:
            delivered.append(block_hash)
            if len(delivered) % 2:
                raise RuntimeError("a receiver's defect")

        tier.read([*hashes_of(blocks), bytes(16)], deliver)
        assert sorted(delivered) == sorted([*hashes_of(blocks), bytes(16)])
        assert read(tier, hashes_of(blocks)) == contents_of(blocks)

    def test_skips_what_it_holds(self, tier: Tier) -> None:
        blocks = self.chain(6)
        write(tier, blocks[:4])
        others = [
            StoredBlock(block.hash, block.parent, block.position, self.payload(100 + index))
            for index, block in enumerate(blocks[:4])
        ]
        assert write(tier, [*others, *blocks[4:]]) == 6
        assert read(tier, hashes_of(blocks)) == contents_of(blocks)

    def test_keeps_one_of_two_equal_blocks(self, tier: Tier) -> None:
        (block,) = self.chain(1)
        assert write(tier, [block, block]) == 2
        assert read(tier, [block.hash]) == contents_of([block])

    def test_keeps_chains_apart(self, tier: Tier) -> None:
        one, other = self.chain(3, "one"), self.chain(3, "other")
        write(tier, [*one, *other])
        assert tier.match([one[0].hash, other[1].hash, one[2].hash]) == 3
        assert read(tier, hashes_of(one + other)) == contents_of(one + other)

    def test_a_chain_can_begin_anywhere(self, tier: Tier) -> None:
        blocks = self.chain(9)
        assert write(tier, blocks[4:]) == 5
        assert tier.match(hashes_of(blocks)) == 0
        assert tier.match(hashes_of(blocks[4:])) == 5

    @pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
    def test_takes_any_buffer(self, tier: Tier, wrap: Callable[[bytes], Buffer]) -> None:
        blocks = self.chain(3)
        assert write(tier, [replaced(block, wrap(bytes(block.payload))) for block in blocks]) == 3
        assert read(tier, hashes_of(blocks)) == contents_of(blocks)

    def test_payloads_may_be_overwritten_after_write(self, tier: Tier) -> None:
        blocks = self.chain(3)
        buffers = [bytearray(block.payload) for block in blocks]
        tier.write([replaced(block, buffer) for block, buffer in zip(blocks, buffers, strict=True)])
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))
        assert tier.flush(FLUSH_SECONDS)
        assert read(tier, hashes_of(blocks)) == contents_of(blocks)

    def test_discards(self, tier: Tier) -> None:
        blocks = self.chain(5)
        write(tier, blocks)
        tier.discard([blocks[2].hash, bytes(16)])
        assert tier.match(hashes_of(blocks)) == 2
        assert tier.match(hashes_of(blocks[3:])) == 2
        assert read(tier, hashes_of(blocks)) == {**contents_of(blocks), blocks[2].hash: None}

    def test_takes_a_discarded_block_again(self, tier: Tier) -> None:
        blocks = self.chain(3)
        write(tier, blocks)
        tier.discard(hashes_of(blocks))
        assert write(tier, blocks) == 3
        assert tier.match(hashes_of(blocks)) == 3
        assert read(tier, hashes_of(blocks)) == contents_of(blocks)

    def test_flushes_when_there_is_nothing_to_flush(self, tier: Tier) -> None:
        assert tier.flush(FLUSH_SECONDS)
        assert tier.flush(FLUSH_SECONDS)

    def test_stats_are_plain_numbers(self, tier: Tier) -> None:
        blocks = self.chain(3)
        write(tier, blocks)
        read(tier, [*hashes_of(blocks), bytes(16)])
        stats = tier.stats()
        assert stats
        for name, value in stats.items():
            assert re.fullmatch("[a-z][a-z0-9]*(_[a-z0-9]+)*", name), name
            assert type(value) in (int, float), name
            assert math.isfinite(value), name
            assert value >= 0, name

    def test_closes_twice(self, open_tier: Callable[[], Tier]) -> None:
        tier = open_tier()
        write(tier, self.chain(2))
        tier.close()
        tier.close()

    def test_is_empty_when_closed(self, open_tier: Callable[[], Tier]) -> None:
        tier = open_tier()
        blocks = self.chain(4)
        write(tier, blocks[:3])
        tier.close()
        assert tier.match(hashes_of(blocks)) == 0
        assert read(tier, hashes_of(blocks)) == dict.fromkeys(hashes_of(blocks))
        assert tier.write(blocks) == 0
        tier.discard(hashes_of(blocks))
        tier.flush(0.1)
        assert tier.stats()

    def test_many_threads_at_once(self, tier: Tier) -> None:
        chains = [self.chain(10, f"chain {index}") for index in range(6)]
        wrong: list[str] = []

        def work(number: int) -> None:
            for step in range(12):
                blocks = chains[(number + step) % len(chains)]
                if step % 3 == 2:
                    tier.discard([blocks[-1].hash])
                tier.write(blocks)
                tier.match(hashes_of(blocks))
                known = contents_of(blocks)
                for block_hash, payload in read_all(tier, hashes_of(blocks)):
                    if payload not in (None, known[block_hash]):
                        wrong.append(f"thread {number}, step {step}: wrong bytes for {block_hash.hex()}")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert not wrong
        everything = [block for blocks in chains for block in blocks]
        assert write(tier, everything) == len(everything)
        assert read(tier, hashes_of(everything)) == contents_of(everything)

    def test_is_closed_under_readers_and_writers(self, open_tier: Callable[[], Tier]) -> None:
        tier = open_tier()
        blocks = self.chain(20)
        known = contents_of(blocks)
        write(tier, blocks[:10])
        stop = threading.Event()

        def work(_: int) -> int:
            rounds = 0
            while not stop.is_set() or rounds == 0:
                rounds += 1
                tier.write(blocks)
                delivered = read_all(tier, hashes_of(blocks))
                assert len(delivered) == len(blocks)
                assert all(payload in (None, known[block_hash]) for block_hash, payload in delivered)
            return rounds

        with ThreadPoolExecutor(3) as pool:
            results = [pool.submit(work, number) for number in range(3)]
            tier.close()
            stop.set()
            assert all(result.result() for result in results)
        assert tier.match(hashes_of(blocks)) == 0


class PersistentTierSuite(TierSuite):
    """For tiers whose blocks are there again when the tier is opened at the same place."""

    def test_holds_its_blocks_when_opened_again(self, open_tier: Callable[[], Tier]) -> None:
        blocks = self.chain(12)
        first = open_tier()
        write(first, blocks)
        first.close()
        second = open_tier()
        assert second.match(hashes_of(blocks)) == 12
        assert read(second, hashes_of(blocks)) == contents_of(blocks)
        assert write(second, blocks) == 12

    def test_goes_on_where_it_stopped(self, open_tier: Callable[[], Tier]) -> None:
        blocks = self.chain(12)
        for count in (4, 8, 12):
            tier = open_tier()
            assert write(tier, blocks[:count]) == count
            tier.close()
        assert read(open_tier(), hashes_of(blocks)) == contents_of(blocks)

    def test_close_makes_durable(self, open_tier: Callable[[], Tier]) -> None:
        blocks = self.chain(5)
        tier = open_tier()
        assert tier.write(blocks) == 5
        tier.close()
        assert open_tier().match(hashes_of(blocks)) == 5


class BoundedTierSuite(TierSuite):
    """For local tiers that evict. `overfull` is how many payloads are certainly more than fit."""

    overfull: int

    def test_stays_within_its_bound(self, tier: Tier) -> None:
        blocks = self.chain(self.overfull)
        for start in range(0, self.overfull, 10):
            tier.write(blocks[start : start + 10])
            stats = tier.stats()
            assert stats["size_bytes"] <= stats["capacity_bytes"]
        assert tier.stats()["evictions"] > 0

    def test_what_remains_is_exact(self, tier: Tier) -> None:
        blocks = self.chain(self.overfull)
        tier.write(blocks)
        remaining = read(tier, hashes_of(blocks))
        known = contents_of(blocks)
        assert all(payload in (None, known[block_hash]) for block_hash, payload in remaining.items())
        found = [block_hash for block_hash, payload in remaining.items() if payload is not None]
        assert 0 < len(found) < self.overfull
        # A miss is forgotten, so match now agrees with what could be read.
        for block_hash, payload in remaining.items():
            assert tier.match([block_hash]) == (payload is not None)

    def test_takes_new_blocks_when_it_is_full(self, tier: Tier) -> None:
        tier.write(self.chain(self.overfull))
        fresh = self.chain(5, "fresh")
        assert write(tier, fresh) == 5
        assert read(tier, hashes_of(fresh)) == contents_of(fresh)


def hashes_of(blocks: Sequence[StoredBlock]) -> list[bytes]:
    return [block.hash for block in blocks]


def contents_of(blocks: Sequence[StoredBlock]) -> dict[bytes, bytes]:
    return {block.hash: bytes(block.payload) for block in blocks}


def replaced(block: StoredBlock, payload: Buffer) -> StoredBlock:
    return StoredBlock(block.hash, block.parent, block.position, payload)


def write(tier: Tier, blocks: Sequence[StoredBlock]) -> int:
    """Write and flush; return what `write` did."""
    count = tier.write(blocks)
    assert tier.flush(FLUSH_SECONDS)
    return count


def read_all(tier: Tier, hashes: Sequence[bytes]) -> list[tuple[bytes, bytes | None]]:
    """Return everything that was delivered, copied, in the order of arrival."""
    lock = threading.Lock()
    delivered: list[tuple[bytes, bytes | None]] = []

    def deliver(block_hash: bytes, payload: Buffer | None) -> None:
        copy = None if payload is None else bytes(payload)
        with lock:
            delivered.append((block_hash, copy))

    tier.read(hashes, deliver)
    return delivered


def read(tier: Tier, hashes: Sequence[bytes]) -> dict[bytes, bytes | None]:
    """Read different blocks, and check that each was delivered exactly once."""
    delivered = read_all(tier, hashes)
    assert sorted(block_hash for block_hash, _ in delivered) == sorted(hashes)
    return dict(delivered)
