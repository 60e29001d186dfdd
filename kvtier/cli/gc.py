"""`kvtier gc`: what may go from the bucket, and why."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from kvtier.cli.common import ConfigOption, JsonFlag, bucket_settings, opened_bucket, read_option
from kvtier.config import format_duration, format_size, parse_duration, parse_size
from kvtier.errors import KvTierError, TierUnavailable

if TYPE_CHECKING:
    from kvtier.tiers.s3.bucket import Bucket
    from kvtier.tiers.s3.gc import Collector, Plan

_MOST_ROWS = 40
_REASONS = {
    "superseded": "other packs hold all of its blocks",
    "ttl": "not used for longer than the ttl",
    "quota": "least recently used, above the quota",
    "orphan": "above the quota, and its chain lacks its beginning",
    "deleted": "condemned before, time of grace is over",
    "revived": "condemned before, but used since",
}


def gc(
    config: ConfigOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, and why; write and delete nothing.")
    ] = False,
    ttl: Annotated[str | None, typer.Option(help="Instead of s3.ttl: 720h.")] = None,
    quota: Annotated[str | None, typer.Option(help="Instead of s3.quota: 5TiB.")] = None,
    grace: Annotated[
        str, typer.Option(help="Time between taking a pack out of the index and deleting it; 0s: at once.")
    ] = "15m",
    no_lease: Annotated[
        bool, typer.Option("--no-lease", help="For servers without conditional PUT: nobody else runs gc now.")
    ] = False,
    json_out: JsonFlag = False,
) -> None:
    """Delete from the bucket what is old, too much, or superseded; and merge short packs.

    A pack goes in two steps: out of the index now, out of the bucket by the next run after the time of grace.
    """
    from kvtier.tiers.s3.gc import Collector

    settings = bucket_settings(config)
    with opened_bucket(settings) as bucket:
        collector = Collector(
            bucket,
            settings.prefix,
            ttl=settings.ttl if ttl is None else read_option("--ttl", ttl, parse_duration),
            quota=settings.quota if quota is None else read_option("--quota", quota, parse_size),
            grace=read_option("--grace", grace, parse_duration),
        )
        if dry_run:
            # The first listing tells the server's time.
            next(bucket.list(f"{settings.prefix}/gc/"), None)
            _show(collector.plan(), None, json_out)
            return
        plan, done = _run(bucket, settings.prefix, collector, no_lease)
    _show(plan, done, json_out)


def _run(bucket: Bucket, prefix: str, collector: Collector, no_lease: bool) -> tuple[Plan, dict[str, int]]:
    from kvtier.tiers.s3.lease import Lease, NoLease

    lease: Lease | NoLease = NoLease()
    if no_lease:
        next(bucket.list(f"{prefix}/gc/"), None)
    else:
        lease = Lease(bucket, prefix)
        if not lease.acquire():
            raise TierUnavailable(
                "another node collects garbage just now, or died doing so; try again in minutes"
            )
    try:
        plan = collector.plan(lease)
        return plan, asdict(collector.carry_out(plan, lease))
    finally:
        # It runs out by itself.
        with contextlib.suppress(KvTierError):
            lease.release()


def _entries(plan: Plan) -> list[dict[str, Any]]:
    judged = [(verdict.pack, verdict.reason) for verdict in plan.verdicts]
    judged += [(pack, "deleted") for pack in plan.doomed] + [(pack, "revived") for pack in plan.revived]
    return [
        {
            "namespace": pack.namespace,
            "pack": pack.name.hex(),
            "position": pack.position,
            "blocks": pack.count,
            "bytes": pack.size,
            "unused_seconds": max(0, round(plan.surveys[pack.namespace].taken - pack.used)),
            "reason": reason,
        }
        for pack, reason in judged
    ]


def _show(plan: Plan, done: dict[str, int] | None, json_out: bool) -> None:
    entries = _entries(plan)
    merges = sum(len(runs) for runs in plan.runs.values())
    waiting = sum(pack.size for pack in plan.waiting)
    if json_out:
        report = {
            "dry_run": done is None,
            "packs": plan.packs,
            "bytes": plan.size,
            "waiting_packs": len(plan.waiting),
            "waiting_bytes": waiting,
            "mergeable_runs": merges,
            "entries": entries,
            "done": done,
        }
        typer.echo(json.dumps(report))
        return
    console = Console()
    console.print(
        f"{format_size(plan.size)} in the index; {format_size(waiting)} condemned, in their time of grace"
    )
    if entries:
        console.print(_table(entries))
    for reason, count in Counter(entry["reason"] for entry in entries).items():
        size = sum(entry["bytes"] for entry in entries if entry["reason"] == reason)
        console.print(f"{reason}: {count} packs, {format_size(size)}: {_REASONS[reason]}")
    if done is None:
        console.print(f"{merges} runs of short packs can be merged. Nothing was changed (--dry-run).")
    else:
        console.print(
            f"{done['condemned']} packs condemned, {done['deleted']} deleted "
            f"({format_size(done['deleted_bytes'])}), {done['revived']} revived, "
            f"{done['merged']} written by merging, {done['recovered']} recovered"
        )


def _table(entries: list[dict[str, Any]]) -> Table:
    table = Table("namespace", "pack", "first block", "blocks", "size", "unused", "reason")
    for entry in entries[:_MOST_ROWS]:
        table.add_row(
            entry["namespace"][:8],
            entry["pack"][:12],
            str(entry["position"]),
            str(entry["blocks"]),
            format_size(entry["bytes"]),
            format_duration(entry["unused_seconds"]),
            entry["reason"],
        )
    if len(entries) > _MOST_ROWS:
        table.add_row("…", f"{len(entries) - _MOST_ROWS} more", "", "", "", "", "")
    return table
