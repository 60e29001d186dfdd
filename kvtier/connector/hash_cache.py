"""Hashes of prompts that were looked up lately: the next turn of a chat hashes only what is new."""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence

from kvtier.hashing import MultimodalItem, hash_blocks

CHUNK_BLOCKS = 64
"""Blocks of one entry; of a known prefix up to as many are hashed again."""

MAX_TOKENS = 4 << 20
"""Tokens whose hashes are kept: about 25 MiB."""


class HashCache:
    """A tree of chunks of tokens. A chunk is found by its very tokens, not by a digest of them.

    So no two prompts can be taken for each other, whatever somebody puts into them.

    Attributes:
        tokens_per_block: Tokens in a block.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self._step = CHUNK_BLOCKS * tokens_per_block
        self._most = max(1, MAX_TOKENS // self._step)
        self._ids = itertools.count()
        # By parent (the chain's root, or another chunk's id) and tokens: the chunk's id and hashes. Entries
        # whose parent was dropped are not found any more, and are dropped in their turn.
        self._chunks: OrderedDict[tuple[bytes | int, bytes], tuple[int, Sequence[bytes]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def find(self, root: bytes, tokens: array[int], blocks: int) -> list[bytes]:
        """Return the hashes of leading blocks of a prompt, at most `blocks`, as far as they are known."""
        found: list[bytes] = []
        parent: bytes | int = root
        for start in range(0, blocks // CHUNK_BLOCKS * self._step, self._step):
            key = (parent, tokens[start : start + self._step].tobytes())
            chunk = self._chunks.get(key)
            if chunk is None:
                break
            self._chunks.move_to_end(key)
            parent, hashes = chunk
            found += hashes
        return found

    def add(self, root: bytes, tokens: array[int], hashes: Sequence[bytes]) -> None:
        """Remember the hashes of the leading blocks of a prompt."""
        parent: bytes | int = root
        for first in range(0, len(hashes) - CHUNK_BLOCKS + 1, CHUNK_BLOCKS):
            start = first // CHUNK_BLOCKS * self._step
            key = (parent, tokens[start : start + self._step].tobytes())
            if key not in self._chunks:
                self._chunks[key] = (next(self._ids), tuple(hashes[first : first + CHUNK_BLOCKS]))
            parent, _ = self._chunks[key]
        while len(self._chunks) > self._most:
            self._chunks.popitem(last=False)


def extend_hashes(
    hashes: list[bytes],
    root: bytes,
    tokens: array[int],
    blocks: int,
    tokens_per_block: int,
    items: Sequence[MultimodalItem],
    cache: HashCache | None,
) -> list[bytes]:
    """Hash up to `blocks` whole blocks of a request's tokens.

    Args:
        hashes: Those of its leading blocks, as far as they are known; the new ones are appended.
        root: Where the chain starts.
        tokens: The request's tokens.
        blocks: How many hashes are wanted.
        tokens_per_block: Tokens in a block.
        items: The request's multimodal items.
        cache: Asked, and told, when nothing is known yet.

    Returns:
        `hashes`.
    """
    cache = None if hashes else cache
    if cache is not None:
        hashes += cache.find(root, tokens, blocks)
    have = len(hashes)
    if have < blocks:
        hashes += hash_blocks(
            hashes[-1] if hashes else root,
            tokens[have * tokens_per_block : blocks * tokens_per_block],
            tokens_per_block,
            first_block=have,
            multimodal=items,
        )
    if cache is not None:
        cache.add(root, tokens, hashes)
    return hashes
