"""A look at all packs of a namespace: what the index says, what is there, what uses what, and when."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3.bucket import Bucket, ListedObject, ObjectMissing
from kvtier.tiers.s3.heat import Use, load_heat
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lifecycle import StoredPack
from kvtier.tiers.s3.namespaces import MAX_PAYLOAD_BYTES
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, Pack, read_footer
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import MAX_SEGMENT_BYTES, read_segment
from kvtier.tiers.s3.tombstone import MAX_TOMBSTONE_BYTES, Tombstone, read_tombstone

LOST_SECONDS = 3600.0
"""Younger packs that no segment lists may be just about to be listed."""
SETTLED_SECONDS = 600.0
"""A pack takes the place of others once it is older: every node has heard of it."""
_MAX_FOOTERS = 4096


@dataclass(slots=True)
class Grave:
    """A pack that a tombstone names and no later segment lists.

    Attributes:
        since: When the look at the bucket began that condemned it, seconds by the server's clock.
        dug: When the tombstone was written, by the server's clock.
        listed: Whether a segment that was written after `since` lists it.
    """

    since: float
    dug: float
    listed: bool = False


@dataclass(slots=True)
class Survey:
    """What lies in one namespace.

    Attributes:
        name: The namespace, 32 hexadecimal digits.
        keys: Names of its objects.
        taken: When the look began, in seconds since 1970 by the server's clock.
        index: The packs that are in the bucket's index, and in the bucket.
        packs: The same packs, by name.
        buried: Packs that tombstones name, by name, as far as they are still in the bucket.
        graves: What their tombstones say.
        salts: Names of all packs that tombstones name, and the random parts of those tombstones' keys.
        said: When the last segment or tombstone that names a pack says that it was written, in nanoseconds.
        gone: Names of packs that the index lists and the bucket lacks.
        recovered: Packs that no segment lists, from their footers.
        unreadable: Objects in the place of packs whose footer is of no use, and that no segment lists.
        uses: Heat, by block; only of blocks that are in the bucket.
        summaries: Keys of the summaries of accesses.
    """

    name: str
    keys: Keys
    taken: float
    index: BlockIndex = field(default_factory=BlockIndex)
    packs: dict[bytes, StoredPack] = field(default_factory=dict)
    buried: dict[bytes, StoredPack] = field(default_factory=dict)
    buried_index: BlockIndex = field(default_factory=BlockIndex)
    graves: dict[bytes, Grave] = field(default_factory=dict)
    salts: dict[bytes, bytes] = field(default_factory=dict)
    said: dict[bytes, int] = field(default_factory=dict)
    gone: list[bytes] = field(default_factory=list)
    recovered: list[Pack] = field(default_factory=list)
    unreadable: list[StoredPack] = field(default_factory=list)
    uses: dict[bytes, Use] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)


def take_survey(bucket: Bucket, prefix: str, name: str) -> Survey:
    """Look at a namespace; writes nothing.

    Reads the whole index, and lists all packs. The clock of the bucket should have been set by a listing.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    survey = Survey(name, Keys(prefix, name), bucket.server_time() - 1.0)
    # In this order: what a segment lists was there before the packs are listed.
    listed, dead = _read_index(bucket, survey)
    present = {
        pack: item
        for item in bucket.list(survey.keys.packs)
        if (pack := survey.keys.pack_name(item.key)) is not None
    }
    survey.gone = [pack for pack in listed.names() if pack not in present]
    _recover(bucket, survey, set(listed.names()), present)
    survey.index.add(_present(listed, present))
    survey.index.add(survey.recovered)
    survey.buried_index.add(_present(dead, present))
    survey.packs = _stand(survey.name, survey.index, present)
    survey.buried = _stand(survey.name, survey.buried_index, present)
    for pack in survey.graves.keys() & present.keys():
        buried = survey.buried.setdefault(pack, _unlinked(survey.name, pack, present[pack]))
        buried.condemned, buried.superseded = survey.graves[pack].since, False
    _link(survey)
    _warm(bucket, survey)
    return survey


def _read_index(bucket: Bucket, survey: Survey) -> tuple[PackTable, PackTable]:
    """Return the packs that the index lists, and those that tombstones have taken out of it."""
    keys = survey.keys
    tables: list[PackTable] = []
    written: list[float] = []
    places: dict[bytes, tuple[int, int]] = {}
    dead: dict[bytes, tuple[int, int]] = {}
    for item in list(bucket.list(keys.index)):
        found = _read_one(bucket, survey, item)
        if found is None:
            continue
        names = found.names if isinstance(found, Tombstone) else found.names()
        survey.said.update(dict.fromkeys(names, keys.index_time(item.key) or 0))
        if isinstance(found, Tombstone):
            for pack in names:
                survey.salts[pack] = keys.tombstone_salt(item.key) or b""
                survey.graves[pack] = Grave(found.since / 1e9, item.modified)
                if (known := places.pop(pack, None)) is not None:
                    dead[pack] = known
        else:
            for place, pack in enumerate(names):
                places[pack] = (len(tables), place)
                dead.pop(pack, None)
                survey.graves.pop(pack, None)
            tables.append(found)
            written.append(item.modified)
    for table, when in zip(tables, written, strict=True):
        for pack in survey.graves.keys() & table.names():
            survey.graves[pack].listed |= when >= survey.graves[pack].since
    return _gather(tables, places.values()), _gather(tables, dead.values())


def _read_one(bucket: Bucket, survey: Survey, item: ListedObject) -> PackTable | Tombstone | None:
    if survey.keys.index_time(item.key) is None:
        return None
    buries = survey.keys.tombstone_salt(item.key) is not None
    namespace = bytes.fromhex(survey.name)
    try:
        if not 0 < item.size <= (MAX_TOMBSTONE_BYTES if buries else MAX_SEGMENT_BYTES):
            return None
        data = bytearray(item.size)
        bucket.get_range(item.key, 0, memoryview(data))
        if buries:
            return read_tombstone(data, namespace)
        return read_segment(data, namespace, MAX_PAYLOAD_BYTES)
    except (ObjectMissing, CorruptBlock):
        # Compacted away meanwhile, or damaged: what it lists is found by the footers.
        return None


def _gather(tables: Sequence[PackTable], places: Iterable[tuple[int, int]]) -> PackTable:
    """Return packs by table and place, in their order."""
    chosen: dict[int, list[int]] = {}
    for table, place in sorted(places):
        chosen.setdefault(table, []).append(place)
    return PackTable.join([tables[table].take(rows) for table, rows in chosen.items()])


def _present(table: PackTable, present: dict[bytes, ListedObject]) -> PackTable:
    return table.take([place for place, pack in enumerate(table.names()) if pack in present])


def _recover(bucket: Bucket, survey: Survey, listed: set[bytes], present: dict[bytes, ListedObject]) -> None:
    lost = [
        pack
        for pack, item in present.items()
        if pack not in listed and pack not in survey.graves and item.modified < survey.taken - LOST_SECONDS
    ]
    for pack in lost[:_MAX_FOOTERS]:
        item = present[pack]
        try:
            tail, size = bucket.get_tail(item.key, MAX_TAIL_BYTES)
            survey.recovered.append(
                read_footer(tail, size, pack, bytes.fromhex(survey.name), MAX_PAYLOAD_BYTES)
            )
        except ObjectMissing:
            continue
        except CorruptBlock:
            survey.unreadable.append(_unlinked(survey.name, pack, item))


def _unlinked(name: str, pack: bytes, item: ListedObject) -> StoredPack:
    """Return a pack of which nothing is known but that its object is there."""
    return StoredPack(name, pack, item.size, 1, 0, b"", b"", item.modified, item.modified)


def _stand(name: str, index: BlockIndex, present: dict[bytes, ListedObject]) -> dict[bytes, StoredPack]:
    table, served = index.packs()
    ends = table.starts()[1:] - 1
    lasts = np.ascontiguousarray(table.blocks["hash"][ends]).tobytes()
    columns = zip(
        table.names(),
        table.packs["position"].tolist(),
        table.packs["count"].tolist(),
        table.packs["parent"],
        served.tolist(),
        strict=True,
    )
    packs: dict[bytes, StoredPack] = {}
    for place, (pack, position, count, before, blocks) in enumerate(columns):
        item = present[pack]
        packs[pack] = StoredPack(
            name,
            pack,
            item.size,
            position,
            count,
            before.tobytes(),
            lasts[16 * place : 16 * place + 16],
            item.modified,
            item.modified,
            superseded=blocks == 0,
        )
    return packs


def _link(survey: Survey) -> None:
    """Find each pack's parent, and take back that a pack is superseded where that is too new to count."""
    everyone = [pack for pack in (*survey.packs.values(), *survey.buried.values()) if pack.position]
    wanted = [pack.before for pack in everyone]
    live, dead = survey.index.locate(wanted), survey.buried_index.locate(wanted)
    for pack, first, second in zip(everyone, live, dead, strict=True):
        if first is not None:
            pack.parent = survey.packs[first.pack.name]
        elif second is not None:
            pack.parent = survey.buried[second.pack.name]
    settled = survey.taken - SETTLED_SECONDS
    for pack in survey.packs.values():
        known = survey.index.pack(pack.name) if pack.superseded else None
        if known is not None:
            others = {place.pack.name for place in survey.index.locate(known.hashes) if place is not None}
            pack.superseded = all(survey.packs[other].modified < settled for other in others)


def _warm(bucket: Bucket, survey: Survey) -> None:
    uses, survey.summaries = load_heat(bucket, survey.keys, bytes.fromhex(survey.name))
    blocks = list(uses)
    live, dead = survey.index.locate(blocks), survey.buried_index.locate(blocks)
    for block, first, second in zip(blocks, live, dead, strict=True):
        if first is not None:
            pack = survey.packs[first.pack.name]
        elif second is not None:
            pack = survey.buried[second.pack.name]
        else:
            continue
        use = survey.uses[block] = uses[block]
        pack.used = max(pack.used, use.last)
        pack.heat += use.count_at(survey.taken)
