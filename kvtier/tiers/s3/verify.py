"""Checking all that a namespace has in the bucket, to the last checksum, and removing what is damaged."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from kvtier._workers import Workers
from kvtier.codec import check_block
from kvtier.errors import CorruptBlock
from kvtier.tiers.s3.bucket import BadReply, Bucket, ListedObject, ObjectMissing
from kvtier.tiers.s3.heat import MAX_HEAT_BYTES, read_heat
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.namespaces import MAX_PAYLOAD_BYTES, read_facts
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, Pack, read_footer
from kvtier.tiers.s3.segment import MAX_SEGMENT_BYTES, read_segment
from kvtier.tiers.s3.tombstone import MAX_TOMBSTONE_BYTES, read_tombstone

_THREADS = 8
_GAP_BYTES = 1 << 20
_AHEAD = 64
"""Packs that wait for a thread at most: a bucket has more than memory should hold."""


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that cannot be used.

    Attributes:
        key: The object.
        block: The block in it, hexadecimal; empty where the whole object is meant.
        problem: What is wrong.
        removable: Whether deleting the object is a repair: nothing is lost that could be read.
    """

    key: str
    block: str
    problem: str
    removable: bool = True


@dataclass(slots=True)
class Findings:
    """What there is in one namespace.

    Attributes:
        packs: Packs that were read.
        blocks: Blocks in them.
        bytes: Bytes of the packs.
        segments: Index segments.
        unlisted: Packs that no readable segment lists.
        damages: What cannot be used.
    """

    packs: int = 0
    blocks: int = 0
    bytes: int = 0
    segments: int = 0
    unlisted: int = 0
    damages: list[Damage] = field(default_factory=list)


class Verifier:
    """Reads everything of one namespace."""

    def __init__(self, bucket: Bucket, prefix: str, name: str, on_bytes: Callable[[int], None]):
        """Prepare.

        Args:
            bucket: The bucket.
            prefix: Of all keys.
            name: The namespace's id as 32 hexadecimal digits.
            on_bytes: Called from several threads with the bytes of each pack that has been checked.
        """
        self._bucket = bucket
        self._keys = Keys(prefix, name)
        self._name = name
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._found = Findings()
        self._listed: set[bytes] = set()

    def pack_bytes(self) -> int:
        """Return the bytes of all packs, by listing them.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        return sum(item.size for item in self._bucket.list(self._keys.packs))

    def run(self) -> Findings:
        """Read and check document, index, summaries of accesses and packs.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        self._check_document()
        for item in self._bucket.list(self._keys.index):
            if self._keys.segment_time(item.key) is not None:
                self._check_small(item, MAX_SEGMENT_BYTES, self._check_segment)
            elif self._keys.index_time(item.key) is not None:
                self._check_small(item, MAX_TOMBSTONE_BYTES, self._check_tombstone)
        for item in self._bucket.list(self._keys.heat):
            if self._keys.is_heat(item.key):
                self._check_small(item, MAX_HEAT_BYTES, self._check_heat)
        self._check_packs()
        self._found.damages.sort(key=lambda damage: (damage.key, damage.block))
        return self._found

    def repair(self) -> int:
        """Delete what `run` found damaged where that loses nothing; return how many objects.

        A damaged pack goes as a whole: whoever comes for its sound blocks misses, and writes them again.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        keys = {damage.key for damage in self._found.damages if damage.removable}
        for key in sorted(keys):
            self._bucket.delete(key)
        return len(keys)

    def _check_document(self) -> None:
        try:
            read_facts(self._bucket, self._keys, self._name)
        except ObjectMissing:
            # The next node writes it; nothing depends on it.
            return
        except CorruptBlock as error:
            self._damaged(self._keys.namespace, "", error)

    def _check_small(self, item: ListedObject, limit: int, check: Callable[[bytearray], object]) -> None:
        try:
            if not 0 < item.size <= limit:
                raise CorruptBlock(f"an object of {item.size} bytes")
            data = bytearray(item.size)
            self._bucket.get_range(item.key, 0, memoryview(data))
            check(data)
        except ObjectMissing:
            # Compacted away meanwhile.
            return
        except CorruptBlock as error:
            self._damaged(item.key, "", error)

    def _check_segment(self, data: bytearray) -> None:
        self._listed.update(read_segment(data, bytes.fromhex(self._name), MAX_PAYLOAD_BYTES).names())
        self._found.segments += 1

    def _check_tombstone(self, data: bytearray) -> None:
        read_tombstone(data, bytes.fromhex(self._name))

    def _check_heat(self, data: bytearray) -> None:
        read_heat(data, 0.0, bytes.fromhex(self._name))

    def _check_packs(self) -> None:
        pool = Workers("verify", _THREADS)
        room = threading.Semaphore(_AHEAD)
        try:
            futures = []
            for item in self._bucket.list(self._keys.packs):
                name = self._keys.pack_name(item.key)
                if name is None:
                    continue
                room.acquire()
                futures.append(pool.submit(partial(self._check_pack, item, name, room.release)))
                while futures and futures[0].done():
                    futures.pop(0).result()
            for future in futures:
                future.result()
        finally:
            pool.close(cancel=True)

    def _check_pack(self, item: ListedObject, name: bytes, done: Callable[[], object]) -> None:
        try:
            tail, size = self._bucket.get_tail(item.key, MAX_TAIL_BYTES)
            pack = read_footer(tail, size, name, bytes.fromhex(self._name), MAX_PAYLOAD_BYTES)
            end = pack.offsets[-1] + pack.lengths[-1]
            start = pack.offsets[0]
            self._bucket.get_parts(item.key, start, end - start, self._checked(item.key, pack))
            with self._lock:
                self._found.packs += 1
                self._found.blocks += len(pack.hashes)
                self._found.bytes += size
                self._found.unlisted += name not in self._listed
        except ObjectMissing:
            # Deleted between the listing and now.
            return
        except CorruptBlock as error:
            self._damaged(item.key, "", error)
        finally:
            done()
            self._on_bytes(item.size)

    def _checked(self, key: str, pack: Pack) -> Iterator[memoryview]:
        """Give room for each block and each gap of a pack, and check each block once it has come."""
        end = pack.offsets[0]
        buffer = memoryview(bytearray(max(pack.lengths)))
        for block_hash, offset, length in zip(pack.hashes, pack.offsets, pack.lengths, strict=True):
            while end < offset:
                gap = memoryview(bytearray(min(offset - end, _GAP_BYTES)))
                yield gap
                end += len(gap)
            yield buffer[:length]
            try:
                check_block(buffer[:length], block_hash, bytes.fromhex(self._name))
            except CorruptBlock as error:
                self._damaged(key, block_hash.hex(), error)
            end = offset + length

    def _damaged(self, key: str, block: str, error: CorruptBlock) -> None:
        # A reply that is none says nothing about the object: something stands in between.
        damage = Damage(key, block, str(error), removable=not isinstance(error, BadReply))
        with self._lock:
            self._found.damages.append(damage)
