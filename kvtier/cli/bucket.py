"""`kvtier bucket`: making a bucket ready, and finding out what it lets kvtier do."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from kvtier.cli.common import ConfigOption, JsonFlag, bucket_settings, opened_bucket
from kvtier.config import S3Config
from kvtier.errors import KvTierError

app = typer.Typer(help="Make a bucket ready for kvtier.", no_args_is_help=True)


@app.command()
def init(config: ConfigOption = None, json_out: JsonFlag = False) -> None:
    """Try every permission with real requests, set the rule for aborted uploads, print the IAM policy.

    Exit code 1 when something is missing that kvtier cannot do without.
    """
    settings = bucket_settings(config)
    report = _inspect(settings)
    if json_out:
        typer.echo(json.dumps(report))
    else:
        _show(settings, report)
    if not report["usable"]:
        raise typer.Exit(1)


def _inspect(config: S3Config) -> dict[str, Any]:
    from kvtier.tiers.s3.policy import iam_policy
    from kvtier.tiers.s3.probe import probe

    with opened_bucket(config) as bucket:
        checks = probe(bucket, config.prefix)
    return {
        "bucket": config.bucket,
        "prefix": config.prefix,
        "usable": all(check.ok for check in checks if check.needed),
        "checks": [asdict(check) for check in checks],
        "aborted_uploads": _set_upload_rule(config),
        "policy": iam_policy(config),
    }


def _set_upload_rule(config: S3Config) -> dict[str, Any]:
    from kvtier.tiers.s3.boto_bucket import make_client
    from kvtier.tiers.s3.policy import SETUP_ACTIONS
    from kvtier.tiers.s3.upload_rule import DAYS, ensure_upload_rule

    try:
        client = make_client(config)
        try:
            written = ensure_upload_rule(client, config.bucket, config.prefix)
        finally:
            client.close()
    except KvTierError as error:
        needs = " and ".join(SETUP_ACTIONS)
        return {"ok": False, "detail": f"{error}; this command alone needs {needs}"}
    done = "set" if written else "was set already"
    return {"ok": True, "detail": f"{done}: unfinished uploads below {config.prefix}/ go after {DAYS} day"}


def _show(config: S3Config, report: dict[str, Any]) -> None:
    place = f"{config.bucket} at {config.endpoint or 'AWS'}, below {config.prefix}/"
    table = Table("what", "for", "works", title=place)
    rule = report["aborted_uploads"]
    upload_rule = {
        "name": "rule for aborted uploads",
        "purpose": "pay for nothing unfinished",
        "needed": False,
        **rule,
    }
    details: dict[str, list[str]] = {}
    for check in [*report["checks"], upload_rule]:
        works = "yes" if check["ok"] else "NO" if check["needed"] else "no"
        table.add_row(check["name"], check["purpose"], works)
        if check["detail"]:
            details.setdefault(check["detail"], []).append(check["name"])
    Console().print(table)
    for detail, names in details.items():
        # Unlike rich's own, this output is not wrapped: it may be copied.
        typer.echo(f"{', '.join(names)}: {detail}")
    usable = "The bucket can be used." if report["usable"] else "The bucket cannot be used as it is."
    typer.echo(f"{usable} The smallest IAM policy that suffices:")
    typer.echo(json.dumps(report["policy"], indent=2))
