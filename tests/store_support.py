"""Shared by the store's tests: small blocks whose bytes follow from their hash, and a tier in a dict."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore, ticket_slot
from kvtier.tiers import Deliver, StoredBlock, Tier
from kvtier.tiers.memory import MemoryTier

LAYOUT = BlockLayout("bfloat16", tokens_per_block=4, layers=2, kv_factor=2, row_elements=64)
NAMESPACE = Namespace.from_facts({"model": "test", **LAYOUT.describe()})
ROOT = chain_root(NAMESPACE.id)


def chain(blocks: int, seed: int = 0) -> list[bytes]:
    """Return the hashes of a prompt of `blocks` whole blocks; prompts of one seed share their prefix."""
    tokens = [seed * 1000 + i for i in range(blocks * LAYOUT.tokens_per_block)]
    return hash_blocks(ROOT, tokens, LAYOUT.tokens_per_block)


def content(block: bytes, size: int = LAYOUT.block_bytes) -> bytes:
    """Return the bytes that the block with this hash has."""
    return hashlib.shake_128(block).digest(size)


def save(store: TieredStore, hashes: Sequence[bytes], parent: bytes = ROOT, position: int = 0) -> int:
    """Save blocks as an engine of all shards would; returns how many got a slot."""
    tickets = store.reserve(parent, position, hashes)
    size = store.layout.shard_bytes
    taken = [(block, ticket) for block, ticket in zip(hashes, tickets, strict=True) if ticket is not None]
    for shard in range(store.layout.shards):
        for block, ticket in taken:
            whole = content(block, store.layout.block_bytes)
            store.slot_view(ticket_slot(ticket), shard)[:] = whole[shard * size : (shard + 1) * size]
        store.commit([ticket for _, ticket in taken], shard)
    return len(taken)


def read(store: TieredStore, slots: Sequence[int]) -> list[bytes]:
    """Return what the slots hold, all shards."""
    return [
        b"".join(bytes(store.slot_view(slot, shard)) for shard in range(store.layout.shards))
        for slot in slots
    ]


class DictTier:
    """A tier in a dictionary, whose reads can be held up, fail or lie."""

    def __init__(self, name: str = "disk") -> None:
        self.name = name
        self.blocks: dict[bytes, bytes] = {}
        self.open = threading.Event()
        self.open.set()
        self.reads: list[bytes] = []
        self.lost: set[bytes] = set()
        self.discarded: list[bytes] = []
        self.closed = False

    def match(self, hashes: Sequence[bytes]) -> int:
        for count, block in enumerate(hashes):
            if block not in self.blocks:
                return count
        return len(hashes)

    def read(self, hashes: Sequence[bytes], deliver: Deliver) -> None:
        self.reads.extend(hashes)
        self.open.wait(30)
        for block in hashes:
            payload = None if block in self.lost else self.blocks.get(block)
            if payload is None:
                self.blocks.pop(block, None)
            deliver(block, payload)

    def write(self, blocks: Sequence[StoredBlock]) -> int:
        for block in blocks:
            self.blocks.setdefault(block.hash, bytes(block.payload))
        return len(blocks)

    def discard(self, hashes: Sequence[bytes]) -> None:
        self.discarded.extend(hashes)
        for block in hashes:
            self.blocks.pop(block, None)

    def flush(self, timeout: float) -> bool:
        return True

    def stats(self) -> dict[str, int | float]:
        return {"blocks": len(self.blocks)}

    def close(self, timeout: float = 10.0) -> None:
        self.closed = True


def make_store(
    tiers: Sequence[Tier] = (), slots: int = 16, layout: BlockLayout = LAYOUT, **options: object
) -> TieredStore:
    """Return a store over an arena of `slots` slots."""
    namespace = Namespace.from_facts({"model": "test", **layout.describe()})
    stride = -(-layout.block_bytes // 4096) * 4096
    return TieredStore(
        namespace,
        layout,
        MemoryTier(slots * stride, layout.block_bytes),
        tiers,
        **options,  # type: ignore[arg-type]
    )
