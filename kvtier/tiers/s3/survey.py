"""A look at all packs of a namespace: what the index says, what is there, what uses what, and when."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kvtier.errors import CorruptBlock
from kvtier.hashing import HASH_BYTES
from kvtier.tiers.s3.bucket import Bucket, ListedObject, ObjectMissing
from kvtier.tiers.s3.heat import Use, load_heat
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lifecycle import PACK, Holdings
from kvtier.tiers.s3.namespaces import MAX_PAYLOAD_BYTES
from kvtier.tiers.s3.pack import MAX_TAIL_BYTES, Pack, read_footer
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.pack_view import PackView
from kvtier.tiers.s3.segment import MAX_SEGMENT_BYTES, read_segment
from kvtier.tiers.s3.tombstone import MAX_TOMBSTONE_BYTES, Tombstone, read_tombstone

LOST_SECONDS = 3600.0
"""Younger packs that no segment lists may be just about to be listed."""
SETTLED_SECONDS = 600.0
"""A pack takes the place of others once it is older: every node has heard of it."""
_MAX_FOOTERS = 4096
Array = np.ndarray[Any, np.dtype[Any]]


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


@dataclass(frozen=True, slots=True)
class Mention:
    """What one segment or tombstone names.

    Attributes:
        names: The packs, `S16`, in order.
        time: When it says that it was written, in nanoseconds.
        modified: When it was written, in seconds by the server's clock.
        lists: Whether it lists them, or takes them out.
    """

    names: Array
    time: int
    modified: float
    lists: bool


@dataclass(slots=True)
class Survey:
    """What lies in one namespace.

    Attributes:
        name: The namespace, 32 hexadecimal digits.
        keys: Names of its objects.
        taken: When the look began, in seconds since 1970 by the server's clock.
        index: The packs that are in the bucket's index, and in the bucket.
        buried_index: Those that tombstones name, as far as they are still in the bucket.
        holdings: Both, and objects in the place of packs that no segment lists and whose footer is of no use.
        graves: What the tombstones say, by the name of the pack.
        salts: Names of all packs that tombstones name, and the random parts of those tombstones' keys.
        mentions: What each segment and tombstone names.
        gone: Names of packs that the index lists and the bucket lacks.
        recovered: Packs that no segment lists, from their footers.
        uses: Heat, by block; only of blocks that are in the bucket.
        summaries: Keys of the summaries of accesses.
    """

    name: str
    keys: Keys
    taken: float
    index: BlockIndex = field(default_factory=BlockIndex)
    buried_index: BlockIndex = field(default_factory=BlockIndex)
    holdings: Holdings = field(default_factory=lambda: Holdings("", np.empty(0, PACK)))
    graves: dict[bytes, Grave] = field(default_factory=dict)
    salts: dict[bytes, bytes] = field(default_factory=dict)
    mentions: list[Mention] = field(default_factory=list)
    gone: list[bytes] = field(default_factory=list)
    recovered: list[Pack] = field(default_factory=list)
    uses: dict[bytes, Use] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)

    def last_mention(self, names: Sequence[bytes]) -> int:
        """Return when the last segment or tombstone that names one of these says that it was written."""
        wanted = _sortable(names)
        return max(
            (mention.time for mention in self.mentions if np.isin(mention.names, wanted).any()), default=0
        )


@dataclass(frozen=True, slots=True)
class _Objects:
    """The objects of all packs, ordered by name."""

    names: Array
    sizes: Array
    modified: Array

    def find(self, names: Array) -> Array:
        """Return where each of these names is, -1 if there is no such object."""
        if not len(self.names):
            return np.full(len(names), -1)
        found = np.minimum(np.searchsorted(self.names, names), len(self.names) - 1)
        return np.where(self.names[found] == names, found, -1)

    def name(self, place: int) -> bytes:
        return self.names[place : place + 1].tobytes()


def take_survey(bucket: Bucket, prefix: str, name: str) -> Survey:
    """Look at a namespace; writes nothing.

    Reads the whole index, and lists all packs. The clock of the bucket should have been set by a listing.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    survey = Survey(name, Keys(prefix, name), bucket.server_time() - 1.0)
    # In this order: what a segment lists was there before the packs are listed.
    _read_index(bucket, survey)
    objects = _list_packs(bucket, survey.keys)
    survey.gone = _forget_missing(survey.index, objects)
    _forget_missing(survey.buried_index, objects)
    unreadable = _recover(bucket, survey, objects)
    survey.index.add(survey.recovered)
    live, dead = survey.index.packs(), survey.buried_index.packs()
    survey.holdings = Holdings(name, _stand(survey, live, dead, objects, unreadable))
    _judge_superseded(survey, live)
    _warm(bucket, survey, live, dead)
    return survey


def _read_index(bucket: Bucket, survey: Survey) -> None:
    keys = survey.keys
    for item in list(bucket.list(keys.index)):
        found = _read_one(bucket, survey, item)
        if found is None:
            continue
        names = found.names if isinstance(found, Tombstone) else found.names()
        lists = not isinstance(found, Tombstone)
        survey.mentions.append(
            Mention(_sortable(names), keys.index_time(item.key) or 0, item.modified, lists)
        )
        if isinstance(found, Tombstone):
            survey.buried_index.add(survey.index.table(names))
            survey.index.forget_named(names)
            survey.salts.update(dict.fromkeys(names, keys.tombstone_salt(item.key) or b""))
            survey.graves.update((pack, Grave(found.since / 1e9, item.modified)) for pack in names)
        else:
            survey.index.add(found)
            for pack in survey.graves.keys() & set(names) if survey.graves else ():
                del survey.graves[pack]
                survey.buried_index.forget_named([pack])
    if survey.graves:
        condemned = _sortable(list(survey.graves))
        for mention in survey.mentions if len(condemned) else ():
            hits = mention.names[np.isin(mention.names, condemned)] if mention.lists else condemned[:0]
            for pack in _names(hits):
                survey.graves[pack].listed |= mention.modified >= survey.graves[pack].since


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


def _list_packs(bucket: Bucket, keys: Keys) -> _Objects:
    names, sizes, modified = bytearray(), array("q"), array("d")
    for item in bucket.list(keys.packs):
        pack = keys.pack_name(item.key)
        if pack is not None:
            names += pack
            sizes.append(item.size)
            modified.append(item.modified)
    # Keys come in order, and so do names.
    return _Objects(np.frombuffer(bytes(names), "S16"), np.array(sizes), np.array(modified))


def _forget_missing(index: BlockIndex, objects: _Objects) -> list[bytes]:
    """Take the packs out of an index that have no object, and return their names."""
    names = _sortable(index.names())
    missing = _names(names[objects.find(names) < 0])
    index.forget_named(missing)
    return missing


def _recover(bucket: Bucket, survey: Survey, objects: _Objects) -> list[int]:
    """Read the footers of packs that no segment lists; return the objects whose footer is of no use."""
    known = _sortable([*survey.index.names(), *survey.graves])
    lost = ~np.isin(objects.names, known) & (objects.modified < survey.taken - LOST_SECONDS)
    unreadable = []
    for place in np.flatnonzero(lost)[:_MAX_FOOTERS].tolist():
        pack = objects.name(place)
        try:
            tail, size = bucket.get_tail(survey.keys.pack(pack), MAX_TAIL_BYTES)
            survey.recovered.append(
                read_footer(tail, size, pack, bytes.fromhex(survey.name), MAX_PAYLOAD_BYTES)
            )
        except ObjectMissing:
            continue
        except CorruptBlock:
            unreadable.append(place)
    return unreadable


def _stand(
    survey: Survey, live: PackView, dead: PackView, objects: _Objects, unreadable: Sequence[int]
) -> Array:
    """Put all packs into columns, and find each one's parent."""
    condemned = _sortable(list(survey.graves))
    condemned = condemned[objects.find(condemned) >= 0]
    unlinked = condemned[~np.isin(condemned, _sortable_column(dead.rows["name"]))]
    strange = objects.names[np.asarray(unreadable, np.int64)]
    parts = []
    for view, buried in ((live, False), (dead, True)):
        part = np.zeros(len(view.rows), PACK)
        for name in ("name", "position", "count"):
            part[name] = view.rows[name]
        part["before"], part["last"] = view.rows["parent"], view.lasts
        part["unread"] = (view.served == 0) & (not buried)
        part["indexed"], part["buried"] = not buried, buried
        parts.append(part)
    # Nothing is known of these but that there is an object; no chain begins with them.
    for names, buried in ((unlinked, True), (strange, False)):
        part = np.zeros(len(names), PACK)
        part["name"] = np.frombuffer(names.tobytes(), "V16")
        part["position"], part["buried"] = 1, buried
        parts.append(part)
    rows = np.concatenate(parts)
    at = objects.find(_sortable_column(rows["name"]))
    rows["size"], rows["modified"] = objects.sizes[at], objects.modified[at]
    rows["used"] = rows["modified"]
    found = live.holders.find(rows["before"])
    behind = dead.holders.find(rows["before"])
    rows["parent"] = np.where(found >= 0, found, np.where(behind >= 0, behind + len(live.rows), -1))
    return rows


def _judge_superseded(survey: Survey, live: PackView) -> None:
    """Find the packs that may go because others are read instead, and every node has heard of those."""
    rows = survey.holdings.rows
    for row in np.flatnonzero(rows["unread"]).tolist():
        pack = survey.index.pack(rows["name"][row].tobytes())
        if pack is not None:
            others = live.holders.find(np.frombuffer(b"".join(pack.hashes), "V16"))
            rows["superseded"][row] = bool(
                (rows["modified"][others[others >= 0]] < survey.taken - SETTLED_SECONDS).all()
            )


def _warm(bucket: Bucket, survey: Survey, live: PackView, dead: PackView) -> None:
    uses, survey.summaries = load_heat(bucket, survey.keys, bytes.fromhex(survey.name))
    blocks = np.frombuffer(b"".join(uses), "V16")
    found, behind = live.holders.find(blocks), dead.holders.find(blocks)
    packs = np.where(found >= 0, found, np.where(behind >= 0, behind + len(live.rows), -1))
    rows = survey.holdings.rows
    for (block, use), pack in zip(uses.items(), packs.tolist(), strict=True):
        if pack >= 0:
            survey.uses[block] = use
            rows["used"][pack] = max(rows["used"][pack], use.last)
            rows["heat"][pack] += use.count_at(survey.taken)


def _sortable(names: Iterable[bytes]) -> Array:
    """Return names as numpy can sort and compare them; it drops zeros at the end of one that is taken out."""
    return np.frombuffer(b"".join(names), "S16")


def _sortable_column(column: Array) -> Array:
    return np.frombuffer(column.tobytes(), "S16")


def _names(column: Array) -> list[bytes]:
    data = column.tobytes()
    return [data[at : at + HASH_BYTES] for at in range(0, len(data), HASH_BYTES)]
