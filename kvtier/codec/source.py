"""Encoded blocks that are still in a file."""

from __future__ import annotations

import os
from typing import NamedTuple

from kvtier.errors import CorruptBlock


class StoredFile(NamedTuple):
    """A file that holds one encoded block, open for reading.

    Attributes:
        descriptor: Of the file. Whoever opened it closes it.
        length: Bytes of the block, which begins at the file's first.
    """

    descriptor: int
    length: int

    def read(self) -> bytes:
        """Read the whole block.

        Raises:
            CorruptBlock: The file is shorter, or cannot be read.
        """
        try:
            payload = os.pread(self.descriptor, self.length, 0)
        except OSError as error:
            raise CorruptBlock(f"a block's file cannot be read: {error}") from error
        if len(payload) != self.length:
            raise CorruptBlock(f"a block's file ended after {len(payload)} of {self.length} bytes")
        return payload
