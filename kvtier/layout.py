"""How the bytes of one KV block are arranged, and how large they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvtier.errors import LayoutError

ITEM_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
}
"""Element sizes in bytes of the KV dtypes that kvtier stores, by torch's names."""

MAX_BLOCK_BYTES = 1 << 30
"""No real block is larger; sizes read from disk or bucket are checked against it before allocation."""


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The arrangement of one block: `tokens_per_block` tokens of all layers of all shards of a node.

    A block is C-contiguous `[shards, layers, kv_factor, row_elements]` of `dtype`; a row is one layer's
    K (or V): `[kv_heads_local, tokens_per_block, head_dim]` flattened.

    Attributes:
        dtype: torch's name of the element type, a key of `ITEM_BYTES`.
        tokens_per_block: Tokens in one block.
        layers: Local attention layers (rows per K or V in one shard).
        kv_factor: 2 where K and V are apart, 1 for MLA and for pools whose inside is not known.
        row_elements: Elements of one row.
        shards: Tensor-parallel shards that lie side by side in one block.
        kind: "flat" (one pool tensor) or "groups" (pages of several layer groups, one after the other).
        head_dim: Elements of one head of one token, 0 where that is not known. It says which elements are of
            one channel, for compression alone: it is no part of a block's identity.
    """

    dtype: str
    tokens_per_block: int
    layers: int
    kv_factor: int
    row_elements: int
    shards: int = 1
    kind: str = "flat"
    head_dim: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        """Check that the numbers describe a possible block.

        Raises:
            LayoutError: An unknown dtype, a number that is no whole one or below 1, heads that do not fill a
                row, or a block of more than `MAX_BLOCK_BYTES`.
        """
        if self.dtype not in ITEM_BYTES:
            raise LayoutError(f"KV dtype {self.dtype!r} is not supported; allowed: {', '.join(ITEM_BYTES)}")
        numbers = (self.tokens_per_block, self.layers, self.kv_factor, self.row_elements, self.shards)
        if any(not isinstance(number, int) for number in (*numbers, self.head_dim)):
            raise LayoutError(f"a block needs whole numbers, got {self}")
        if min(numbers) < 1:
            raise LayoutError(f"a block needs positive dimensions, got {self}")
        if self.head_dim < 0 or (
            self.head_dim and self.row_elements % (self.tokens_per_block * self.head_dim)
        ):
            raise LayoutError(f"rows do not consist of whole heads: {self}")
        if self.block_bytes > MAX_BLOCK_BYTES:
            raise LayoutError(f"a block of {self.block_bytes} bytes is over the limit of {MAX_BLOCK_BYTES}")

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard's part of a block."""
        return self.layers * self.kv_factor * self.row_elements * ITEM_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block, all shards."""
        return self.shards * self.shard_bytes

    def describe(self) -> dict[str, Any]:
        """Return the fields that make up the identity as plain data, for the namespace document."""
        fields = asdict(self)
        del fields["head_dim"]
        return fields
