"""Collecting garbage: what is planned, and how it is carried out while others read and write.

A pack goes in two steps. First a tombstone takes it out of every node's index; a time of grace later, by the
server's clock, its object is deleted, unless somebody has used, written or listed it since. Whoever still
reads it after that meets a missing object: a miss, and forgotten. A process that dies anywhere leaves
tombstones whose packs the next run deletes, or merged packs that the next run finds by their footers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

from kvtier._workers import Workers
from kvtier.codec import check_block
from kvtier.errors import CorruptBlock, LayoutError, TierError
from kvtier.layout import BlockLayout
from kvtier.tiers.s3.bucket import Bucket, ObjectMissing
from kvtier.tiers.s3.heat import fold_heat
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lifecycle import StoredPack, Verdict, choose
from kvtier.tiers.s3.merge import Verify, merge, mergeable
from kvtier.tiers.s3.namespaces import find_namespaces, read_facts
from kvtier.tiers.s3.pace import Pace
from kvtier.tiers.s3.pack import Pack, window_blocks
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import write_segments
from kvtier.tiers.s3.survey import Survey, take_survey
from kvtier.tiers.s3.tombstone import MAX_NAMES, write_tombstone

GRACE_SECONDS = 900.0
"""How long a pack stays after its tombstone; S3 allows clocks to differ by so much."""
_MERGES = 128
"""Packs that one run writes by merging; the hottest first, the rest another time."""
_MERGE_BYTES_PER_SECOND = 64 << 20
_PUBLISHED_TOGETHER = 16
_DELETED_TOGETHER = 64
_THREADS = 8


class Interrupted(TierError):
    """The process is ending; another run goes on from here."""


class Keeper(Protocol):
    """What is asked before every step: whether this process may still collect garbage."""

    def keep(self) -> None:
        """Renew the lease.

        Raises:
            TierError: It is lost; nothing may be done any more.
        """
        ...


@dataclass(slots=True)
class Plan:
    """What a run would do.

    Attributes:
        surveys: What it saw, by namespace.
        doomed: Packs whose time of grace is over: their objects are deleted.
        revived: Condemned packs that were used, written or listed since: they are listed again.
        waiting: Condemned packs whose time of grace is not over.
        verdicts: Packs that are condemned now, in order.
        runs: Short packs that are merged, by namespace.
    """

    surveys: dict[str, Survey] = field(default_factory=dict)
    doomed: list[StoredPack] = field(default_factory=list)
    revived: list[StoredPack] = field(default_factory=list)
    waiting: list[StoredPack] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    runs: dict[str, list[list[StoredPack]]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes of all packs that are in the index."""
        rows = [survey.holdings.rows for survey in self.surveys.values()]
        return sum(int(some["size"][some["indexed"]].sum()) for some in rows)

    @property
    def packs(self) -> int:
        """How many packs are in the index."""
        return sum(int(survey.holdings.rows["indexed"].sum()) for survey in self.surveys.values())


@dataclass(slots=True)
class Done:
    """What a run has done, in packs: `merged` are the new ones, `recovered` those that no segment listed."""

    deleted: int = 0
    deleted_bytes: int = 0
    condemned: int = 0
    revived: int = 0
    merged: int = 0
    recovered: int = 0


class Collector:
    """Collects the garbage of all namespaces below a prefix."""

    def __init__(
        self,
        bucket: Bucket,
        prefix: str,
        *,
        ttl: float | None = None,
        quota: int | None = None,
        grace: float = GRACE_SECONDS,
        windows: Mapping[str, int] | None = None,
        verify: Verify = check_block,
        stop: threading.Event | None = None,
    ):
        """Prepare.

        Args:
            bucket: The bucket.
            prefix: Of all keys.
            ttl: Seconds without a use after which packs go; None: never.
            quota: Bytes that may stay, all namespaces together; None: any.
            grace: Seconds between tombstone and deletion; with 0 both happen in one run.
            windows: Blocks of a whole pack, for namespaces whose document does not tell.
            verify: Checks a block before it is merged into another pack.
            stop: Ends a run early when it is set.
        """
        self._bucket = bucket
        self._prefix = prefix
        self._ttl = ttl
        self._quota = quota
        self._grace = grace
        self._windows = dict(windows or {})
        self._verify = verify
        self._stop = stop or threading.Event()

    def plan(self, lease: Keeper | None = None) -> Plan:
        """Look at everything and decide; writes nothing but the lease, if there is one.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        plan = Plan()
        for name in list(find_namespaces(self._bucket, self._prefix)):
            if lease is not None:
                self._step(lease)
            plan.surveys[name] = take_survey(self._bucket, self._prefix, name)
        surveys = list(plan.surveys.values())
        for survey in surveys:
            survey.holdings.spread_use()
            self._judge_buried(survey, plan)
        holdings = [survey.holdings for survey in surveys]
        plan.verdicts = choose(holdings, self._bucket.server_time(), self._ttl, self._quota)
        leaving = [verdict.pack for verdict in plan.verdicts]
        for survey in surveys:
            window = self._window(survey.name)
            if window is not None:
                plan.runs[survey.name] = mergeable(survey, window, leaving)
        return plan

    def carry_out(self, plan: Plan, lease: Keeper) -> Done:
        """Do what was planned.

        Raises:
            LeaseLost: Another process collects garbage by now.
            Interrupted: `stop` was set.
            TierError: The bucket does not answer or refuses. In each case the next run does the rest.
        """
        done = Done()
        for survey in plan.surveys.values():
            self._step(lease)
            self._publish(survey, survey.recovered)
            done.recovered += len(survey.recovered)
            done.revived += self._revive(
                survey, [pack for pack in plan.revived if pack.namespace == survey.name]
            )
        self._delete(plan, plan.doomed, lease, done)
        self._condemn(plan, lease, done)
        self._merge(plan, lease, done)
        for survey in plan.surveys.values():
            self._step(lease)
            namespace = bytes.fromhex(survey.name)
            fold_heat(self._bucket, survey.keys, namespace, survey.uses, survey.summaries)
        return done

    def _judge_buried(self, survey: Survey, plan: Plan) -> None:
        # The later in its chain, the earlier a pack goes: no child is left behind, wherever this ends.
        buried = survey.holdings.stored(survey.holdings.rows["buried"])
        for pack in sorted(buried, key=lambda pack: -pack.position):
            grave = survey.graves[pack.name]
            if grave.listed or pack.used >= grave.since:
                if pack.count:
                    plan.revived.append(pack)
            elif max(0.0, survey.taken - grave.dug) < self._grace:
                plan.waiting.append(pack)
            else:
                plan.doomed.append(pack)

    def _window(self, name: str) -> int | None:
        if name in self._windows:
            return self._windows[name]
        try:
            facts = read_facts(self._bucket, Keys(self._prefix, name), name)
            return window_blocks(BlockLayout(**facts["layout"]))
        except (CorruptBlock, ObjectMissing, LayoutError, KeyError, TypeError):
            return None

    def _step(self, lease: Keeper) -> None:
        if self._stop.is_set():
            raise Interrupted("collecting garbage was interrupted")
        lease.keep()

    def _publish(self, survey: Survey, packs: Sequence[Pack]) -> None:
        if packs:
            for body in write_segments(PackTable.of(packs), bytes.fromhex(survey.name)):
                when = self._after(survey, [pack.name for pack in packs])
                self._bucket.put(survey.keys.new_segment(when), body)

    def _after(self, survey: Survey, names: Sequence[bytes]) -> int:
        """Return the time for what is said of packs now: it sorts after all that was said of them before."""
        return max(int(self._bucket.server_time() * 1e9), survey.last_mention(names) + 1)

    def _revive(self, survey: Survey, packs: Iterable[StoredPack]) -> int:
        known = [pack for stored in packs if (pack := survey.buried_index.pack(stored.name)) is not None]
        self._publish(survey, known)
        return len(known)

    def _delete(self, plan: Plan, packs: Iterable[StoredPack], lease: Keeper, done: Done) -> None:
        workers = Workers("s3-gc", _THREADS)
        waiting = iter(packs)
        try:
            while batch := list(islice(waiting, _DELETED_TOGETHER)):
                self._step(lease)
                keys = [plan.surveys[pack.namespace].keys.pack(pack.name) for pack in batch]
                for future in [workers.submit(partial(self._bucket.delete, key)) for key in keys]:
                    future.result()
                done.deleted += len(batch)
                done.deleted_bytes += sum(pack.size for pack in batch)
        finally:
            workers.close(cancel=True)

    def _condemn(self, plan: Plan, lease: Keeper, done: Done) -> None:
        leaving = [verdict.pack for verdict in plan.verdicts]
        for survey in plan.surveys.values():
            names = [pack.name for pack in leaving if pack.namespace == survey.name]
            done.condemned += len(names)
            names += survey.gone
            for start in range(0, len(names), MAX_NAMES):
                self._step(lease)
                some = names[start : start + MAX_NAMES]
                body = write_tombstone(some, int(survey.taken * 1e9), bytes.fromhex(survey.name))
                self._bucket.put(survey.keys.new_tombstone(self._after(survey, some)), body)
        if not self._grace:
            self._delete(plan, leaving, lease, done)

    def _merge(self, plan: Plan, lease: Keeper, done: Done) -> None:
        pace, left = Pace(_MERGE_BYTES_PER_SECOND), _MERGES
        for survey in plan.surveys.values():
            merged: list[Pack] = []
            runs = sorted(plan.runs.get(survey.name, ()), key=lambda run: -run[-1].heat)
            for run in runs[:left]:
                self._step(lease)
                pack = merge(self._bucket, survey, run, self._verify)
                if pack is not None:
                    merged.append(pack)
                if len(merged) == _PUBLISHED_TOGETHER:
                    self._publish(survey, merged)
                    done.merged += len(merged)
                    merged = []
                self._stop.wait(pace.rest(sum(part.size for part in run)))
            self._publish(survey, merged)
            done.merged += len(merged)
            left -= min(left, len(runs))
