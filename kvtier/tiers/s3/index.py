"""The block index: where in the bucket each known block lies, answered from memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvtier.tiers.s3.pack import Pack


class Location(NamedTuple):
    """Where one block lies.

    Attributes:
        hash: The block.
        pack: The pack that holds it.
        offset: Where its payload starts in the pack.
        length: Bytes of the payload.
    """

    hash: bytes
    pack: Pack
    offset: int
    length: int


class BlockIndex:
    """Maps block hashes to packs. Thread-safe; lookups take no lock.

    A block that several packs hold is known by the largest of them, because short packs are the ones to be
    merged away; of equal ones by the last, which may have been written because another could not be used.
    Quarantined locations stay out, however often a pack that lists them is added.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[bytes, Pack] = {}
        self._packs: dict[bytes, Pack] = {}
        self._quarantine: set[tuple[bytes, bytes, int]] = set()

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return the length of the longest leading run of known blocks."""
        blocks = self._blocks
        for count, block_hash in enumerate(hashes):
            if block_hash not in blocks:
                return count
        return len(hashes)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._blocks

    def locate(self, hashes: Iterable[bytes]) -> list[Location | None]:
        """Return where each of `hashes` lies, None for those that are not known."""
        found: list[Location | None] = []
        place = 0
        for block_hash in hashes:
            pack = self._blocks.get(block_hash)
            if pack is None:
                found.append(None)
                continue
            # Blocks of a chain are asked for in order, so the next one mostly follows the last.
            place += 1
            if place >= len(pack.hashes) or pack.hashes[place] != block_hash:
                place = pack.hashes.index(block_hash)
            found.append(Location(block_hash, pack, pack.offsets[place], pack.lengths[place]))
        return found

    def pack(self, name: bytes) -> Pack | None:
        """Return the pack of this name, None if it has not been added or was forgotten."""
        return self._packs.get(name)

    def add(self, packs: Iterable[Pack]) -> None:
        """Add packs. One that is known under the same name replaces what was known if it differs.

        A server without conditional PUT lets a second writer overwrite a pack; what was listed later holds.
        """
        with self._lock:
            for pack in packs:
                known = self._packs.get(pack.name)
                if known is not None and known != pack:
                    self._remove(known)
                    known = None
                # What is known already is entered again: its blocks may have been lost with a larger pack.
                self._enter(known or pack)

    def forget(self, pack: Pack) -> None:
        """Remove a pack that is gone from the bucket, and the blocks known by it."""
        with self._lock:
            if self._packs.get(pack.name) is pack:
                self._remove(pack)

    def quarantine(self, hashes: Iterable[bytes]) -> int:
        """Remove blocks and refuse their present locations for as long as this process lives.

        Returns:
            How many of them were known.
        """
        with self._lock:
            locations = [place for place in self.locate(dict.fromkeys(hashes)) if place is not None]
            for block_hash, pack, offset, _ in locations:
                self._quarantine.add((block_hash, pack.name, offset))
                del self._blocks[block_hash]
            return len(locations)

    def counts(self) -> tuple[int, int, int]:
        """Return the numbers of blocks, packs and quarantined locations."""
        return len(self._blocks), len(self._packs), len(self._quarantine)

    def _enter(self, pack: Pack) -> None:
        self._packs[pack.name] = pack
        for block_hash, offset in zip(pack.hashes, pack.offsets, strict=True):
            other = self._blocks.get(block_hash)
            if other is not None and len(other.hashes) > len(pack.hashes):
                continue
            if (block_hash, pack.name, offset) not in self._quarantine:
                self._blocks[block_hash] = pack

    def _remove(self, pack: Pack) -> None:
        del self._packs[pack.name]
        for block_hash in pack.hashes:
            if self._blocks.get(block_hash) is pack:
                del self._blocks[block_hash]
