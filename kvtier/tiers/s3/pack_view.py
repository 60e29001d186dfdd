"""All packs of an index at one moment, in columns, and which of them holds what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kvtier.tiers.s3 import index_kernels as kernels

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Holders:
    """Finds the pack that a block is read from, by the columns of an index; later changes do no harm.

    Attributes:
        slots: The hash table.
        hashes: The hash of each row, as two words.
        owners: The pack that each row is of.
        seed: Of the hash table.
        places: The packs that count, ascending.
    """

    slots: Array
    hashes: Array
    owners: Array
    seed: Any
    places: Array

    def find(self, hashes: Array) -> Array:
        """Return for each of `hashes`, `V16`, which of the packs it is read from; -1 if none."""
        wanted = np.frombuffer(bytearray(hashes.tobytes()), np.uint64).reshape(-1, 2)
        rows = np.empty(len(wanted), np.int64)
        kernels.rows_of(self.slots, self.hashes, self.seed, wanted, rows)
        if not len(self.places):
            return np.full(len(wanted), -1)
        owners = self.owners[rows]
        found = np.minimum(np.searchsorted(self.places, owners), len(self.places) - 1)
        return np.where((rows >= 0) & (self.places[found] == owners), found, -1)


@dataclass(frozen=True, slots=True)
class PackView:
    """All packs, in the order in which they were listed.

    Attributes:
        rows: A `PACK_ROW` for each.
        lasts: The hash of each one's last block, `V16`.
        served: How many blocks each is read for.
        holders: Finds packs by their blocks.
    """

    rows: Array
    lasts: Array
    served: Array
    holders: Holders
