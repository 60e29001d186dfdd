"""Which packs should go: by last use, by quota, children before their parents. Needs no clock, no bucket."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class StoredPack:
    """One pack in the bucket, as whoever collects garbage sees it.

    Attributes:
        namespace: Its namespace, 32 hexadecimal digits.
        name: Its name, 16 bytes.
        size: Bytes of the object.
        position: Place of its first block in the chain.
        count: Blocks.
        before: Hash of the block before its first one.
        last: Hash of its last block.
        modified: When the object was written; times are in seconds since 1970 by the server's clock.
        used: When it was last used: written, hit, or a pack that continues its chain was.
        heat: How often it was used, old uses counting less; continuations included once `spread_use` was.
        parent: The pack that holds the block before its first one, None if no pack does.
        superseded: Whether other packs hold all of its blocks.
        condemned: When the look at the bucket began that condemned it; None if it is in the index.
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
    heat: float = 0.0
    parent: StoredPack | None = None
    superseded: bool = False
    condemned: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A pack that should go, and why: "superseded", "ttl", "orphan" or "quota"."""

    pack: StoredPack
    reason: str


def spread_use(packs: Iterable[StoredPack]) -> None:
    """Let the use of each pack count for those that its chain goes through before it."""
    # A parent begins earlier in its chain: what does not is no parent, whatever the bucket says.
    for pack in sorted(packs, key=lambda pack: -pack.position):
        parent = pack.parent
        if parent is not None and parent.position < pack.position:
            parent.used = max(parent.used, pack.used)
            parent.heat += pack.heat


def choose(
    packs: Sequence[StoredPack], now: float, ttl: float | None = None, quota: int | None = None
) -> list[Verdict]:
    """Choose what should go, in the order in which it should: no pack before those that continue its chain.

    Args:
        packs: All packs that are in the index, after `spread_use`.
        now: Seconds since 1970 by the server's clock.
        ttl: Seconds without a use after which a pack goes; None: never.
        quota: Bytes that may stay; None: any.
    """
    verdicts = [Verdict(pack, "superseded") for pack in packs if pack.superseded]
    rest = [pack for pack in packs if not pack.superseded]
    rooted = _rooted(rest)
    # No parent was used earlier than its children, so these come first; of equal ages the later position.
    rest.sort(key=lambda pack: (pack in rooted, pack.used, -pack.position))
    left = sum(pack.size for pack in rest)
    for pack in rest:
        if ttl is not None and pack.used < now - ttl:
            verdicts.append(Verdict(pack, "ttl"))
        elif quota is not None and left > quota:
            verdicts.append(Verdict(pack, "quota" if pack in rooted else "orphan"))
        else:
            continue
        left -= pack.size
    return verdicts


def _rooted(packs: Iterable[StoredPack]) -> set[StoredPack]:
    """Return the packs whose chains are whole from their first block on: the others are never matched."""
    rooted: set[StoredPack] = set()
    for pack in sorted(packs, key=lambda pack: pack.position):
        if pack.position == 0 or pack.parent in rooted:
            rooted.add(pack)
    return rooted
