"""Merging short packs: the ends of requests, once their chain has gone on beyond the next cut.

A merged pack has another name than those that it is made of, and holds the same bytes. Readers prefer it once
they have heard of it; the short ones are superseded then, and go like other garbage. Whoever dies anywhere
leaves a pack that no segment lists yet, which is found by its footer, or packs that hold the same twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence

from kvtier.errors import CorruptBlock
from kvtier.tiers.base import Buffer, StoredBlock
from kvtier.tiers.s3.bucket import BadReply, Bucket, ObjectMissing, RangeMissing
from kvtier.tiers.s3.lifecycle import StoredPack
from kvtier.tiers.s3.namespaces import MAX_PAYLOAD_BYTES
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, PACK_BYTES, Pack, read_footer, write_pack
from kvtier.tiers.s3.survey import SETTLED_SECONDS, Survey
from kvtier.tiers.s3.tombstone import free_salt

_SALT_BYTES = 8
_MAX_BYTES = 2 * PACK_BYTES
"""Blocks of one window have no more, even if nothing could be compressed."""

Verify = Callable[[Buffer, bytes, bytes], None]
"""Takes an encoded block, its hash and its namespace; raises CorruptBlock."""


def find_runs(packs: Iterable[StoredPack], window: int, settled: float) -> list[list[StoredPack]]:
    """Find consecutive short packs that end together at a cut, and that nothing but each other follows.

    Where chains part, the part that they share stays a pack of its own: merged into each of them it would
    be stored once for each.

    Args:
        packs: Packs of one namespace that are read from.
        window: Blocks of a whole pack.
        settled: Younger packs are left alone, seconds since 1970 by the server's clock.

    Returns:
        Runs of two and more packs in the chain's order, each within one window.
    """
    followers: dict[bytes, list[StoredPack]] = {}
    for pack in packs:
        if pack.position % window:
            followers.setdefault(pack.before, []).append(pack)

    def only_follower(pack: StoredPack) -> StoredPack | None:
        following = followers.get(pack.last, [])
        fits = len(following) == 1 and following[0].position == pack.position + pack.count
        return following[0] if fits and (pack.position + pack.count) % window else None

    follower_of = {pack: following for pack in packs if (following := only_follower(pack)) is not None}
    led = set(follower_of.values())
    runs = []
    for pack in follower_of:
        if pack in led:
            continue
        run = [pack]
        while (following := follower_of.get(run[-1])) is not None:
            run.append(following)
        whole = (run[-1].position + run[-1].count) % window == 0 and sum(part.count for part in run) <= window
        if whole and all(pack.modified < settled for pack in run):
            runs.append(run)
    return runs


def mergeable(survey: Survey, window: int, leaving: Iterable[StoredPack]) -> list[list[StoredPack]]:
    """Return the runs of a namespace that are worth merging, those that are `leaving` left out."""
    rows = survey.holdings.rows
    first, behind = rows["position"] % window, (rows["position"] + rows["count"]) % window
    # Whole packs are neither merged nor continued within their window.
    short = rows["indexed"] & ~rows["unread"] & ((first != 0) | (behind != 0))
    out = {pack.name for pack in leaving if pack.namespace == survey.name}
    staying = [pack for pack in survey.holdings.stored(short) if pack.name not in out]
    return find_runs(staying, window, survey.taken - SETTLED_SECONDS)


def merge(bucket: Bucket, survey: Survey, run: Sequence[StoredPack], verify: Verify) -> Pack | None:
    """Write one pack that holds what those of a run hold; nobody knows of it yet.

    Returns:
        The pack; None if a part is gone, or corrupt: then all stays as it is.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    namespace = bytes.fromhex(survey.name)
    blocks: list[StoredBlock] = []
    try:
        for pack in _sources(survey, run):
            blocks += _read(bucket, survey, pack)
        for block in blocks:
            verify(block.payload, block.hash, namespace)
        salt = free_salt([block.hash for block in blocks], survey.salts)
        body, pack = write_pack(blocks, namespace, salt)
        if bucket.put(survey.keys.pack(pack.name), body):
            return pack
        found = _found(bucket, survey, pack.name)
        if found is not None:
            return found
        # Some servers keep what there was of a PUT that broke off.
        body, pack = write_pack(blocks, namespace, os.urandom(_SALT_BYTES))
        return pack if bucket.put(survey.keys.pack(pack.name), body) else None
    except (ObjectMissing, CorruptBlock):
        return None


def _found(bucket: Bucket, survey: Survey, name: bytes) -> Pack | None:
    """Return the pack that has this name already, None if the object is of no use."""
    try:
        tail, size = bucket.get_tail(survey.keys.pack(name), MAX_TAIL_BYTES)
        return read_footer(tail, size, name, bytes.fromhex(survey.name), MAX_PAYLOAD_BYTES)
    except BadReply:
        # That says nothing about the object.
        raise
    except (CorruptBlock, RangeMissing):
        return None


def _sources(survey: Survey, run: Sequence[StoredPack]) -> list[Pack]:
    """Return the packs of a run.

    Raises:
        ObjectMissing: One is not known any more.
        CorruptBlock: They are said to be larger than what one pack holds.
    """
    packs = [pack for part in run if (pack := survey.index.pack(part.name)) is not None]
    if len(packs) < len(run):
        raise ObjectMissing("a pack that was to be merged")
    size = sum(_end(pack) - pack.offsets[0] for pack in packs)
    if size > _MAX_BYTES:
        raise CorruptBlock(f"{size} bytes of packs cannot become one")
    return packs


def _end(pack: Pack) -> int:
    return pack.offsets[-1] + pack.lengths[-1]


def _read(bucket: Bucket, survey: Survey, pack: Pack) -> list[StoredBlock]:
    start = pack.offsets[0]
    data = memoryview(bytearray(_end(pack) - start))
    bucket.get_range(survey.keys.pack(pack.name), start, data)
    parents = (pack.parent, *pack.hashes[:-1])
    return [
        StoredBlock(block, parent, pack.position + place, data[offset - start : offset - start + length])
        for place, (block, parent, offset, length) in enumerate(
            zip(pack.hashes, parents, pack.offsets, pack.lengths, strict=True)
        )
    ]
