"""`kvtier rebuild-index`: the index, made anew from the packs' footers."""

from __future__ import annotations

import json

import typer

from kvtier._counters import Counters
from kvtier.cli.common import (
    ConfigOption,
    JsonFlag,
    bucket_settings,
    left_alone,
    nothing_there,
    opened_bucket,
)


def rebuild_index(config: ConfigOption = None, json_out: JsonFlag = False) -> None:
    """Index the packs that no readable index segment lists, from their footers; for every namespace."""
    from kvtier.tiers.s3.keys import Keys
    from kvtier.tiers.s3.namespaces import find_namespaces, open_catalog, other_format

    settings = bucket_settings(config)
    report = {}
    with opened_bucket(settings) as bucket:
        names = list(find_namespaces(bucket, settings.prefix))
        for name in names:
            other = other_format(bucket, Keys(settings.prefix, name))
            if other is not None:
                typer.echo(left_alone(name, other), err=json_out)
                continue
            catalog, index = open_catalog(bucket, settings.prefix, name, Counters())
            try:
                recovered = catalog.rebuild()
            finally:
                catalog.close()
            blocks, packs, _ = index.counts()
            report[name] = {"recovered": recovered, "packs": packs, "blocks": blocks}
            if not json_out:
                typer.echo(f"{name}: {recovered} packs indexed anew, now {packs} packs with {blocks} blocks")
    if json_out:
        typer.echo(json.dumps({"namespaces": report}))
    elif not names:
        typer.echo(nothing_there(settings))
