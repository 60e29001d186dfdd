"""`kvtier verify`: everything in the bucket, checked to the last checksum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from kvtier._counters import Counters
from kvtier.cli.common import (
    ConfigOption,
    JsonFlag,
    bucket_settings,
    left_alone,
    nothing_there,
    opened_bucket,
    shows_progress,
)
from kvtier.config import format_size

if TYPE_CHECKING:
    from kvtier.tiers.s3.bucket import Bucket
    from kvtier.tiers.s3.verify import Findings


def verify(
    config: ConfigOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete damaged objects, then index what no segment lists.")
    ] = False,
    json_out: JsonFlag = False,
) -> None:
    """Read every pack and index segment in the bucket, check footers and block checksums, list what is bad.

    Exit code 1 when something is damaged, also when it has been repaired.
    """
    from kvtier.tiers.s3.keys import Keys
    from kvtier.tiers.s3.namespaces import find_namespaces, other_format
    from kvtier.tiers.s3.verify import Verifier

    settings = bucket_settings(config)
    report: dict[str, Any] = {"namespaces": {}, "other_formats": {}, "removed": 0, "reindexed": 0}
    with opened_bucket(settings) as bucket:
        for name in list(find_namespaces(bucket, settings.prefix)):
            other = other_format(bucket, Keys(settings.prefix, name))
            if other is not None:
                report["other_formats"][name] = other
                continue
            with _progress(json_out) as (start, advance):
                verifier = Verifier(bucket, settings.prefix, name, advance)
                start(name, verifier.pack_bytes)
                found = verifier.run()
            report["namespaces"][name] = asdict(found)
            if repair:
                report["removed"] += verifier.repair()
                report["reindexed"] += _reindex(bucket, settings.prefix, name, found)
    if json_out:
        typer.echo(json.dumps(report))
    elif report["namespaces"] or report["other_formats"]:
        _show(report)
    else:
        typer.echo(nothing_there(settings))
    if any(found["damages"] for found in report["namespaces"].values()):
        raise typer.Exit(1)


def _reindex(bucket: Bucket, prefix: str, name: str, found: Findings) -> int:
    from kvtier.tiers.s3.namespaces import open_catalog

    if not found.damages and not found.unlisted:
        return 0
    catalog, _ = open_catalog(bucket, prefix, name, Counters())
    try:
        return catalog.rebuild()
    finally:
        catalog.close()


_Start = Callable[[str, Callable[[], int]], None]


@contextmanager
def _progress(json_out: bool) -> Iterator[tuple[_Start, Callable[[int], None]]]:
    if not shows_progress(json_out):
        yield lambda name, total: None, lambda size: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        yield (
            lambda name, total: progress.update(task, description=name, total=total()),
            lambda size: progress.advance(task, size),
        )


def _show(report: dict[str, Any]) -> None:
    for name, found in report["namespaces"].items():
        typer.echo(
            f"{name}: packs: {found['packs']}, blocks: {found['blocks']}, {format_size(found['bytes'])}\n"
            f"  index segments: {found['segments']}, packs that none lists: {found['unlisted']}, "
            f"damaged: {len(found['damages'])}"
        )
    for found in report["namespaces"].values():
        for damage in found["damages"]:
            block = f" block {damage['block']}" if damage["block"] else ""
            typer.echo(f"damaged: {damage['key']}{block}: {damage['problem']}")
    for name, other in report["other_formats"].items():
        typer.echo(left_alone(name, other))
    if report["removed"] or report["reindexed"]:
        typer.echo(
            f"repaired: {report['removed']} objects deleted, {report['reindexed']} packs indexed again"
        )
    elif any(found["unlisted"] for found in report["namespaces"].values()):
        typer.echo(
            "Nodes find packs that no index segment lists in the background; so does `kvtier rebuild-index`."
        )
