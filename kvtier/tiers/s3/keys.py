"""Where everything lies in the bucket."""

from __future__ import annotations

import re
import secrets

from kvtier.hashing import HASH_BYTES

_NAME = re.compile(r"[0-9a-f]{32}\.kvp")
_COMPACTION = re.compile(r"([0-9]{20})-[0-9a-f]{16}\.json")
_SEGMENT = re.compile(r"([0-9]{20})-[0-9a-f]{16}\.kvi")
_TOMBSTONE = re.compile(r"([0-9]{20})-([0-9a-f]{16})\.kvt")
_HEAT = re.compile(r"[0-9]{20}-[0-9a-f]{16}\.kvh")


class Keys:
    """The object keys of one namespace: `{prefix}/{namespace}/...`.

    Attributes:
        namespace: Key of the namespace document.
        packs: What the keys of all packs begin with.
        index: What the keys of all index segments begin with.
        compactions: What the keys of all records of compactions begin with.
        heat: What the keys of all summaries of accesses begin with.
    """

    def __init__(self, prefix: str, namespace_hex: str):
        """Prepare the keys; `prefix` may be empty."""
        root = f"{prefix}/{namespace_hex}" if prefix else namespace_hex
        self.namespace = f"{root}/namespace.json"
        self.packs = f"{root}/packs/"
        self.index = f"{root}/index/"
        self.compactions = f"{root}/compacted/"
        self.heat = f"{root}/heat/"

    def pack(self, name: bytes) -> str:
        """Return the key of a pack; its first two digits spread packs over key prefixes."""
        digits = name.hex()
        return f"{self.packs}{digits[:2]}/{digits}.kvp"

    def pack_name(self, key: str) -> bytes | None:
        """Return the name of the pack that `key` is of, None if it is not a pack's key."""
        tail = key[len(self.packs) + 3 :]
        if not _NAME.fullmatch(tail):
            return None
        name = bytes.fromhex(tail[: 2 * HASH_BYTES])
        return name if self.pack(name) == key else None

    def new_segment(self, time_ns: int) -> str:
        """Return a fresh key for an index segment written at `time_ns`, nanoseconds since 1970."""
        return f"{self.segments_from(time_ns)}-{secrets.token_hex(8)}.kvi"

    def segments_from(self, time_ns: int) -> str:
        """Return what sorts before all keys of segments written at `time_ns` or later."""
        return f"{self.index}{max(0, time_ns):020d}"

    def segment_time(self, key: str) -> int | None:
        """Return when a segment says that it was written, in nanoseconds; None if `key` is no segment's."""
        match = _SEGMENT.fullmatch(key[len(self.index) :]) if key.startswith(self.index) else None
        return int(match[1]) if match else None

    def new_tombstone(self, time_ns: int) -> str:
        """Return a fresh key for a tombstone written at `time_ns`; it sorts among the segments."""
        return f"{self.segments_from(time_ns)}-{secrets.token_hex(8)}.kvt"

    def index_time(self, key: str) -> int | None:
        """Return when a segment or tombstone says that it was written; None if `key` is of neither."""
        match = _TOMBSTONE.fullmatch(key.removeprefix(self.index))
        return int(match[1]) if match else self.segment_time(key)

    def tombstone_salt(self, key: str) -> bytes | None:
        """Return the random part of a tombstone's key, 8 bytes; None if `key` is of something else."""
        match = _TOMBSTONE.fullmatch(key.removeprefix(self.index))
        return bytes.fromhex(match[2]) if match else None

    def new_heat(self, time_ns: int) -> str:
        """Return a fresh key for a summary of accesses."""
        return f"{self.heat}{max(0, time_ns):020d}-{secrets.token_hex(8)}.kvh"

    def is_heat(self, key: str) -> bool:
        """Tell whether `key` is of a summary of accesses."""
        return _HEAT.fullmatch(key.removeprefix(self.heat)) is not None

    def new_compaction(self, time_ns: int) -> str:
        """Return a fresh key for the record of a compaction."""
        return f"{self.compactions}{max(0, time_ns):020d}-{secrets.token_hex(8)}.json"

    def compaction_time(self, key: str) -> int | None:
        """Return when a compaction says that it happened, in nanoseconds; None if `key` is no record's."""
        match = _COMPACTION.fullmatch(key.removeprefix(self.compactions))
        return int(match[1]) if match else None

    def compaction_claim(self, hour: int) -> str:
        """Return the key that a node writes to compact in an hour since 1970; below the same prefix."""
        return f"{self.compactions}claim-{hour:010d}"
