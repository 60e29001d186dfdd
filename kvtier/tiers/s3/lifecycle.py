"""Which packs should go: by last use, by quota, children before their parents. Needs no clock, no bucket.

A bucket may have a million packs and more, so they stand in columns; objects are for those that are touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PACK = np.dtype(
    [
        ("name", "V16"),
        ("before", "V16"),
        ("last", "V16"),
        ("size", "<i8"),
        ("position", "<i8"),
        ("count", "<i8"),
        ("modified", "<f8"),
        ("used", "<f8"),
        ("heat", "<f8"),
        ("parent", "<i8"),
        ("indexed", "?"),
        ("buried", "?"),
        ("unread", "?"),
        ("superseded", "?"),
    ]
)
"""What is known of a pack: what `StoredPack` says, and

`parent`: the row of the pack that holds the block before its first one, -1 if no pack does;
`indexed`: whether it is in the index;
`buried`: whether a tombstone names it (neither: its footer is of no use);
`unread`: whether all of its blocks are read from other packs;
`superseded`: whether these have been there for so long that it may go.
"""
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class StoredPack:
    """One pack in the bucket, as whoever collects garbage sees it.

    Attributes:
        namespace: Its namespace, 32 hexadecimal digits.
        name: Its name, 16 bytes.
        size: Bytes of the object.
        position: Place of its first block in the chain.
        count: Blocks; 0 if that is not known.
        before: Hash of the block before its first one.
        last: Hash of its last block.
        modified: When the object was written; times are in seconds since 1970 by the server's clock.
        used: When it was last used: written, hit, or a pack that continues its chain was.
        heat: How often it was used, old uses counting less; continuations included once `spread_use` was.
    """

    namespace: str
    name: bytes
    size: int
    position: int
    count: int
    before: bytes
    last: bytes
    modified: float
    used: float
    heat: float


@dataclass(slots=True)
class Holdings:
    """All packs of one namespace.

    Attributes:
        namespace: The namespace, 32 hexadecimal digits.
        rows: A `PACK` for each.
    """

    namespace: str
    rows: Array

    def stored(self, chosen: Array) -> list[StoredPack]:
        """Return the packs of these rows, or of those where a mask is true, one by one."""
        fields = StoredPack.__slots__[1:]
        columns = [self.rows[name][chosen] for name in fields]
        lists = [
            [item.tobytes() for item in column] if column.dtype.kind == "V" else column.tolist()
            for column in columns
        ]
        return [StoredPack(self.namespace, *values) for values in zip(*lists, strict=True)]

    def spread_use(self) -> None:
        """Let the use of each pack count for those that its chain goes through before it."""
        used, heat = self.rows["used"], self.rows["heat"]
        for children, parents in upwards(self.rows["position"], self.rows["parent"]):
            np.maximum.at(used, parents, used[children])
            np.add.at(heat, parents, heat[children])

    def rooted(self, counting: Array) -> Array:
        """Tell of which packs the chains are whole from their first block on: the others are never matched.

        Args:
            counting: Which packs there will be, as a mask.
        """
        rooted: Array = counting & (self.rows["position"] == 0)
        for children, parents in reversed(list(upwards(self.rows["position"], self.rows["parent"]))):
            rooted[children] |= counting[children] & rooted[parents]
        return rooted


@dataclass(frozen=True, slots=True)
class Verdict:
    """A pack that should go, and why: "superseded", "ttl", "orphan" or "quota"."""

    pack: StoredPack
    reason: str


def choose(
    everything: Sequence[Holdings], now: float, ttl: float | None = None, quota: int | None = None
) -> list[Verdict]:
    """Choose what should go, in the order in which it should: no pack before those that continue its chain.

    Args:
        everything: All packs, after `spread_use`. Those that are buried already are left out.
        now: Seconds since 1970 by the server's clock.
        ttl: Seconds without a use after which a pack goes; None: never.
        quota: Bytes that may stay; None: any.
    """
    verdicts: list[Verdict] = []
    parts = [np.empty(0, _CANDIDATE)]
    for place, holdings in enumerate(everything):
        rows = holdings.rows
        superseded = ~rows["buried"] & rows["superseded"]
        verdicts += [Verdict(pack, "superseded") for pack in holdings.stored(superseded)]
        counting = ~rows["buried"] & ~superseded
        part = np.empty(int(counting.sum()), _CANDIDATE)
        part["place"], part["row"] = place, np.flatnonzero(counting)
        part["rooted"] = holdings.rooted(counting)[counting]
        for name in ("used", "position", "size"):
            part[name] = rows[name][counting]
        parts.append(part)
    rest = np.concatenate(parts)
    # No parent was used earlier than its children, so these come first; of equal ages the later position.
    rest = rest[np.lexsort((-rest["position"], rest["used"], rest["rooted"]))]
    old = rest["used"] < now - ttl if ttl is not None else np.zeros(len(rest), np.bool_)
    above = np.zeros(len(rest), np.bool_)
    if quota is not None:
        # Of what is left before each one when all before it have gone; below the quota only the old ones go.
        above = rest["size"].sum() - (np.cumsum(rest["size"]) - rest["size"]) > quota
    going = np.flatnonzero(old | above)
    reasons = np.where(old, "ttl", np.where(rest["rooted"], "quota", "orphan"))[going].tolist()
    packs: dict[int, Iterator[StoredPack]] = {
        place: iter(holdings.stored(rest["row"][going][rest["place"][going] == place]))
        for place, holdings in enumerate(everything)
    }
    places = rest["place"][going].tolist()
    verdicts += [Verdict(next(packs[place]), reason) for place, reason in zip(places, reasons, strict=True)]
    return verdicts


_CANDIDATE = np.dtype(
    [
        ("place", "<i8"),
        ("row", "<i8"),
        ("rooted", "?"),
        ("used", "<f8"),
        ("position", "<i8"),
        ("size", "<i8"),
    ]
)


def upwards(positions: Array, parents: Array) -> Iterator[tuple[Array, Array]]:
    """Give children and their parents, as rows, those that are latest in their chains first.

    Args:
        positions: Of each pack.
        parents: Row of each one's parent, -1 where it has none.
    """
    # A parent begins earlier in its chain: what does not is no parent, whatever the bucket says.
    children = np.flatnonzero((parents >= 0) & (positions[parents] < positions))
    children = children[np.argsort(-positions[children], kind="stable")]
    cuts = np.flatnonzero(np.diff(positions[children])) + 1
    for level in np.split(children, cuts) if len(children) else ():
        yield level, parents[level]
