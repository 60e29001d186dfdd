"""Many packs at once, in columns: index segments are read and written without an object for each block."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.errors import CorruptBlock
from kvtier.hashing import HASH_BYTES
from kvtier.tiers.s3.pack import MAX_PACK_BLOCKS, PACK_HEAD_BYTES, Pack

PACK_ROW = np.dtype(
    [("name", "V16"), ("parent", "V16"), ("size", "<u8"), ("position", "<u4"), ("count", "<u4")]
)
BLOCK_ROW = np.dtype([("hash", "V16"), ("offset", "<u8"), ("length", "<u4")])
Rows = np.ndarray[Any, np.dtype[np.void]]

_MAX_POSITION = 1 << 32
MAX_PACK_BYTES = 1 << 42
"""No object is larger on any server; sums of a million sizes still fit into 63 bits."""


@dataclass(frozen=True, slots=True)
class PackTable:
    """Packs and their blocks.

    Attributes:
        packs: A `PACK_ROW` for each pack; 48 bytes, as in an index segment.
        blocks: A `BLOCK_ROW` for each block, pack by pack, in the chain's order; 28 bytes.
    """

    packs: Rows
    blocks: Rows

    def __len__(self) -> int:
        return len(self.packs)

    @classmethod
    def of(cls, packs: Iterable[Pack]) -> PackTable:
        """Put packs into a table."""
        listed = list(packs)
        blocks = np.empty(sum(len(pack.hashes) for pack in listed), BLOCK_ROW)
        joined = b"".join(block for pack in listed for block in pack.hashes)
        blocks["hash"] = np.frombuffer(joined, "V16")
        blocks["offset"] = np.fromiter((at for pack in listed for at in pack.offsets), "<u8", len(blocks))
        blocks["length"] = np.fromiter((size for pack in listed for size in pack.lengths), "<u4", len(blocks))
        rows = [(pack.name, pack.parent, pack.size, pack.position, len(pack.hashes)) for pack in listed]
        return cls(np.array(rows, PACK_ROW), blocks)

    @classmethod
    def join(cls, tables: Sequence[PackTable]) -> PackTable:
        """Put tables one after the other."""
        return cls(
            np.concatenate([np.empty(0, PACK_ROW), *(table.packs for table in tables)]),
            np.concatenate([np.empty(0, BLOCK_ROW), *(table.blocks for table in tables)]),
        )

    def names(self) -> list[bytes]:
        """Return the packs' names, 16 bytes each."""
        data = self.packs["name"].tobytes()
        return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]

    def starts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return for each pack the row of its first block, and after the last one the number of blocks."""
        return np.concatenate([[0], np.cumsum(self.packs["count"], dtype=np.int64)])

    def take(self, chosen: Sequence[int]) -> PackTable:
        """Return a table of the packs at these places."""
        if len(chosen) == len(self):
            return self
        places = np.asarray(chosen, np.int64)
        packs = self.packs[places]
        rows = spread_rows(self.starts()[places], packs["count"].astype(np.int64))
        return PackTable(packs, self.blocks[rows])

    def pack(self, place: int) -> Pack:
        """Return one pack by itself."""
        starts = self.starts()
        row, blocks = self.packs[place], self.blocks[starts[place] : starts[place + 1]]
        data = blocks["hash"].tobytes()
        return Pack(
            row["name"].tobytes(),
            int(row["size"]),
            row["parent"].tobytes(),
            int(row["position"]),
            tuple(data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)),
            array("Q", blocks["offset"].tolist()),
            array("I", blocks["length"].tolist()),
        )

    def check(self, max_block_bytes: int) -> None:
        """Check that the numbers describe possible packs; see `Pack.check`.

        Raises:
            CorruptBlock: They do not, or packs and blocks do not belong together.
        """
        counts, starts = self.packs["count"].astype(np.int64), self.starts()
        if not counts.all():
            raise CorruptBlock("an index lists a pack of fewer than one block")
        if starts[-1] != len(self.blocks):
            relation = "fewer" if starts[-1] > len(self.blocks) else "more"
            raise CorruptBlock(f"an index lists {relation} blocks than its packs have")
        if len(self) == 0:
            return
        positions = self.packs["position"].astype(np.int64)
        if counts.max() > MAX_PACK_BLOCKS or (positions + counts).max() > _MAX_POSITION:
            raise CorruptBlock("an index lists an impossible pack: too many blocks, or too far in its chain")
        offsets, lengths = self.blocks["offset"], self.blocks["length"].astype(np.uint64)
        ends = offsets + lengths
        # Each block begins where the one before it ends, or later; the first of a pack after its head.
        fronts = np.concatenate([[PACK_HEAD_BYTES], ends[:-1]]).astype(np.uint64)
        fronts[starts[:-1]] = PACK_HEAD_BYTES
        possible = (lengths >= 1) & (lengths <= max_block_bytes) & (offsets >= fronts) & (ends >= offsets)
        if not possible.all():
            raise CorruptBlock("an index lists an impossible block")
        sizes = self.packs["size"]
        if (ends[starts[1:] - 1] > sizes).any() or sizes.max() > MAX_PACK_BYTES:
            raise CorruptBlock("an index lists blocks up to beyond the end of their pack, or an endless pack")


def spread_rows(firsts: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the rows that begin at `firsts`, so many from each on, as one array of indices."""
    ends = np.cumsum(counts)
    rows: np.ndarray[Any, Any] = np.arange(counts.sum()) + np.repeat(firsts - (ends - counts), counts)
    return rows
