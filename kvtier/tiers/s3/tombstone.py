"""Tombstones: small objects among the index segments that take packs out of every node's index.

docs/bucket-layout.md gives the bytes. Whoever collects garbage writes one before it deletes anything: nodes
forget the packs when they read it, and store the same blocks anew under other names.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import xxhash

from kvtier.errors import CorruptBlock
from kvtier.hashing import HASH_BYTES
from kvtier.tiers.s3.pack import pack_name

MAX_NAMES = 262_144
"""A tombstone names no more packs than this."""

_VERSION = 1
_MAGIC = b"KVTGONE\n"
_HEAD = struct.Struct("<8sHHI16sQ")
_CHECKSUM = struct.Struct("<Q")
_MOST_SALTS = 16

MAX_TOMBSTONE_BYTES = _HEAD.size + MAX_NAMES * HASH_BYTES + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Tombstone:
    """Packs that are about to be deleted.

    Attributes:
        names: Their names.
        since: When the look at the bucket began that condemned them, in nanoseconds since 1970 by the
            server's clock: what has happened to a pack since then was not known.
    """

    names: tuple[bytes, ...]
    since: int


def write_tombstone(names: Sequence[bytes], since: int, namespace: bytes) -> bytes:
    """Return the bytes of a tombstone of 1 to `MAX_NAMES` packs."""
    body = _HEAD.pack(_MAGIC, _VERSION, 0, len(names), namespace, since) + b"".join(names)
    return body + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(body))


def read_tombstone(data: bytes | bytearray, namespace: bytes) -> Tombstone:
    """Read a tombstone.

    Raises:
        CorruptBlock: Anything does not fit; also a tombstone of another namespace or version.
    """
    if len(data) < _HEAD.size + _CHECKSUM.size:
        raise CorruptBlock(f"a tombstone of {len(data)} bytes is too short")
    body = bytes(data[: -_CHECKSUM.size])
    if _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0] != xxhash.xxh3_64_intdigest(body):
        raise CorruptBlock("a tombstone has a wrong checksum")
    magic, version, flags, count, owner, since = _HEAD.unpack_from(body)
    if (
        magic != _MAGIC
        or (version, flags) != (_VERSION, 0)
        or len(body) != _HEAD.size + count * HASH_BYTES
        or not 1 <= count <= MAX_NAMES
    ):
        raise CorruptBlock("a tombstone has an unknown format")
    if owner != namespace:
        raise CorruptBlock(f"a tombstone belongs to namespace {owner.hex()}")
    return Tombstone(
        tuple(body[at : at + HASH_BYTES] for at in range(_HEAD.size, len(body), HASH_BYTES)), since
    )


def free_salt(hashes: Sequence[bytes], condemned: Mapping[bytes, bytes]) -> bytes:
    """Return the salt of the name that blocks may be stored under: of a pack that is not being deleted.

    The object under a condemned name may go at any moment, also one that was written anew. The name that is
    used instead comes from the tombstone, so that replicas still store the same blocks once.

    Args:
        hashes: The blocks of the pack.
        condemned: Names of condemned packs, and the random part of the key of each one's tombstone.
    """
    salt = b""
    for _ in range(_MOST_SALTS):
        following = condemned.get(pack_name(hashes, salt))
        if following is None:
            break
        salt = following
    return salt
