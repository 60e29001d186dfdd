"""The protocol that every tier speaks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    # The codec takes a second to import, which not every process needs.
    from kvtier.codec import StoredFile

Buffer = bytes | bytearray | memoryview

Deliver = Callable[[bytes, Buffer | None], None]
"""Receives one block: its hash, and its payload or None for a miss; valid only during the call."""


DeliverFile = Callable[[bytes, "StoredFile | None"], None]
"""Receives the file of one block, open during the call, or None for a miss."""


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block on its way into a tier.

    Attributes:
        hash: The block's chained hash, 16 bytes.
        parent: The hash of the block before it (the chain's root for the first), 16 bytes.
        position: Its place in the chain, 0 for the first block.
        payload: What the tier keeps: the encoded block for disk and bucket, the raw slot for memory.
    """

    hash: bytes
    parent: bytes
    position: int
    payload: Buffer


class Tier(Protocol):
    """A place that keeps blocks by their hash.

    All methods are thread-safe and none raises because the place is slow, full, read-only, corrupt or gone:
    the tier counts the cause (`stats`), logs it once, and answers with a miss. Payloads are not
    interpreted: whoever reads them verifies them.
    """

    name: str

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return the length of the longest leading run of `hashes` that the tier believes it holds.

        Answered from memory, without I/O, in microseconds per block.
        """
        ...

    def read(self, hashes: Sequence[bytes], deliver: Deliver) -> None:
        """Read blocks and hand each to `deliver`, once per hash, in any order and from any thread.

        Blocks until every hash has been delivered; for worker threads, never for the engine's thread.
        A hash that `match` believed in may still be a miss; the tier then forgets it.
        An exception out of `deliver` is the caller's defect: it is logged and the other blocks go on.
        """
        ...

    def write(self, blocks: Sequence[StoredBlock]) -> int:
        """Keep blocks; those already held are skipped. For worker threads.

        Returns:
            How many of `blocks` the tier now holds or has taken over for writing. What a tier queues
            is durable after `flush`.
        """
        ...

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Forget blocks, as far as the tier can: they were found corrupt or are no longer wanted."""
        ...

    def flush(self, timeout: float) -> bool:
        """Make all that was written durable and visible; return False when `timeout` seconds ran out."""
        ...

    def stats(self) -> Mapping[str, int | float]:
        """Return counters and gauges in snake_case; byte counts end in `_bytes`, times in `_seconds`."""
        ...

    def close(self, timeout: float = 10.0) -> None:
        """Flush within `timeout` seconds and free everything; a second call does nothing."""
        ...


@runtime_checkable
class ReadsFiles(Protocol):
    """A tier whose blocks lie in local files, which can be decoded from there without a copy in between."""

    def read_files(self, hashes: Sequence[bytes], deliver: DeliverFile) -> None:
        """Do as `Tier.read` does, but hand out each block's open file, which is closed after `deliver`."""
        ...


@runtime_checkable
class NotesUse(Protocol):
    """A tier that wants to hear of hits in all tiers: what is never read from it may still be in use."""

    def note_use(self, block_hash: bytes) -> None:
        """Note a hit by its last block: those before it in the chain were used too. Takes microseconds."""
        ...
