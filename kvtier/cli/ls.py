"""`kvtier ls`: what lies in the bucket."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from kvtier._counters import Counters
from kvtier.cli.common import ConfigOption, JsonFlag, bucket_settings, nothing_there, opened_bucket
from kvtier.config import format_size
from kvtier.errors import CorruptBlock

if TYPE_CHECKING:
    from kvtier.tiers.s3.bucket import Bucket

_LONGEST_LABEL = 60


def ls(config: ConfigOption = None, json_out: JsonFlag = False) -> None:
    """List the namespaces in the bucket: what they are of, packs, blocks, bytes, last write and use."""
    from kvtier.tiers.s3.namespaces import find_namespaces

    settings = bucket_settings(config)
    with opened_bucket(settings) as bucket:
        names = list(find_namespaces(bucket, settings.prefix))
        report = {name: _summary(bucket, settings.prefix, name) for name in names}
    if json_out:
        typer.echo(json.dumps({"namespaces": report}))
        return
    if not report:
        typer.echo(nothing_there(settings))
        return
    for name, row in report.items():
        typer.echo(_described(name, row, time.time()))


def _described(name: str, row: Mapping[str, Any], now: float) -> str:
    """Say on two lines, which no terminal is too narrow for, what a namespace holds."""
    written, used = (
        "unknown" if row[what] is None else _ago(now - row[what]) for what in ("last_write", "last_use")
    )
    unlisted = f" ({row['unlisted']} listed by no segment)" if row["unlisted"] else ""
    return (
        f"{name}  {row['of']}\n"
        f"  packs: {row['packs']}{unlisted}, blocks: {row['blocks']}, {format_size(row['bytes'])}; "
        f"last write: {written}, last use: {used}"
    )


def _summary(bucket: Bucket, prefix: str, name: str) -> dict[str, Any]:
    from kvtier.tiers.s3.bucket import ObjectMissing
    from kvtier.tiers.s3.heat import load_heat
    from kvtier.tiers.s3.keys import Keys
    from kvtier.tiers.s3.namespaces import open_catalog, read_facts

    keys = Keys(prefix, name)
    try:
        label = describe_facts(read_facts(bucket, keys, name))
    except (CorruptBlock, ObjectMissing):
        label = "unknown"
    catalog, index = open_catalog(bucket, prefix, name, Counters())
    try:
        catalog.refresh()
    finally:
        catalog.close()
    listed = set(index.names())
    sizes = {
        pack: item.size for item in bucket.list(keys.packs) if (pack := keys.pack_name(item.key)) is not None
    }
    uses, _ = load_heat(bucket, keys, bytes.fromhex(name))
    times = [keys.segment_time(item.key) for item in bucket.list(keys.index)]
    written = max((when for when in times if when is not None), default=None)
    return {
        "of": label,
        "packs": len(sizes),
        "blocks": index.counts()[0],
        "bytes": sum(sizes.values()),
        "unlisted": len(sizes.keys() - listed),
        "last_write": None if written is None else written / 1e9,
        "last_use": max((use.last for use in uses.values()), default=None),
    }


def describe_facts(facts: Mapping[str, Any]) -> str:
    """Say in a few words what a namespace's blocks are of, as far as its facts tell."""
    model, layout = facts.get("model"), facts.get("layout")
    words = []
    if isinstance(model, Mapping):
        described = model.get("config")
        kinds = described.get("architectures") if isinstance(described, Mapping) else None
        words.append(model.get("name") or (kinds[0] if isinstance(kinds, list) and kinds else None))
    else:
        words.append(model)
    if isinstance(layout, Mapping):
        words += [
            layout.get("dtype"),
            layout.get("tokens_per_block") and f"{layout['tokens_per_block']} tokens",
        ]
    # What stands in the bucket may be anything: no control characters for the terminal.
    text = " ".join(str(word) for word in words if word)
    return "".join(char for char in text if char.isprintable())[:_LONGEST_LABEL] or "unknown"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
