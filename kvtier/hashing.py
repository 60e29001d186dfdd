"""Block identity: the chained hash of token blocks, and the namespace that it starts from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HASH_BYTES = 16
FORMAT_VERSION = 1
"""Version of everything that gives stored bytes their meaning; part of every namespace."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A fingerprint of everything that changes the bytes of a KV block.

    Attributes:
        facts: The readable facts, plain JSON data; written to the bucket as `namespace.json`.
        id: BLAKE2b-128 of the canonical JSON of `facts`, 16 bytes.
    """

    facts: Mapping[str, Any]
    id: bytes

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Namespace:
        """Fingerprint `facts`; the format version is mixed in here and need not be given."""
        full = {**facts, "format_version": FORMAT_VERSION}
        canonical = json.dumps(full, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return cls(full, hashlib.blake2b(canonical.encode(), digest_size=HASH_BYTES).digest())

    @property
    def hex(self) -> str:
        """The id as 32 hexadecimal digits, as it stands in object keys and paths."""
        return self.id.hex()

    @property
    def is_private(self) -> bool:
        """Whether only one engine has such blocks: the facts about its model name an owner, `private`."""
        model = self.facts.get("model")
        return isinstance(model, Mapping) and "private" in model

    def document(self) -> str:
        """The facts as indented JSON, for people."""
        return json.dumps({"id": self.hex, **self.facts}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class MultimodalItem:
    """One image, clip or sound in a prompt: its content's digest and the tokens that it stands for.

    Attributes:
        digest: Hash of the content, any length.
        start: Position of its first token in the prompt.
        length: Number of tokens.
    """

    digest: bytes
    start: int
    length: int


def chain_root(
    namespace: bytes, cache_salt: str | int | None = None, lora_id: int | str | None = None
) -> bytes:
    """Return the 16 bytes that a chain starts from.

    Each part is tagged and length-prefixed, so that no two combinations share a root: a missing salt
    differs from an empty one, and the salt "7" from the salt id 7.
    """
    root = hashlib.blake2b(digest_size=HASH_BYTES, person=b"kvtier.root")
    root.update(namespace)
    for tag, value in ((b"S", cache_salt), (b"L", lora_id)):
        if value is None:
            root.update(tag + b"-")
            continue
        kind = b"i" if isinstance(value, int) else b"s"
        data = str(value).encode()
        root.update(tag + kind + len(data).to_bytes(4, "little") + data)
    return root.digest()


def hash_blocks(
    parent: bytes,
    tokens: Sequence[int] | np.ndarray[Any, Any],
    tokens_per_block: int,
    *,
    first_block: int = 0,
    multimodal: Iterable[MultimodalItem] = (),
) -> list[bytes]:
    """Hash the whole blocks of `tokens`, each chained to the one before.

    Args:
        parent: Hash of the block before the first one, or `chain_root(...)`; 16 bytes.
        tokens: Token ids, int32 range; a trailing partial block is ignored.
        tokens_per_block: Tokens in a block.
        first_block: Position of the first block in the prompt; only matters to multimodal items.
        multimodal: Items of the prompt; each mixes its digest, its length, and where it lies relative to
            the block, into every block that it overlaps.

    Returns:
        `len(tokens) // tokens_per_block` hashes of 16 bytes.
    """
    count = len(tokens) // tokens_per_block
    if count == 0:
        return []
    data = np.asarray(tokens[: count * tokens_per_block], dtype="<i4").tobytes()
    step = tokens_per_block * 4
    items = list(multimodal)
    hashes: list[bytes] = []
    blake2b = hashlib.blake2b
    for index in range(count):
        message = parent + data[index * step : (index + 1) * step]
        if items:
            message += _multimodal_extra(items, (first_block + index) * tokens_per_block, tokens_per_block)
        parent = blake2b(message, digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes


def _multimodal_extra(items: Sequence[MultimodalItem], start: int, length: int) -> bytes:
    extra = b""
    for item in items:
        if item.start < start + length and start < item.start + item.length:
            offset = (item.start - start).to_bytes(8, "little", signed=True)
            # The length tells apart what was made of the same picture at two resolutions.
            size = item.length.to_bytes(8, "little")
            extra += b"M" + len(item.digest).to_bytes(4, "little") + item.digest + offset + size
    return extra
