"""`kvtier status`: what this node's agent holds and does."""

from __future__ import annotations

import http.client
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from kvtier.cli.common import ConfigOption, JsonFlag
from kvtier.config import Config, format_size, load_config
from kvtier.errors import ConfigError, TierUnavailable

_SECONDS = 5.0
_MOST_ADDRESS_BYTES = 300
_MOST_REPLY_BYTES = 16 << 20
_NAMESPACE = re.compile(r"[0-9a-f]{32}")
_AGENT = "kvtier_agent_"
_STORE = "kvtier_"

Values = Mapping[str, float]


def status(config: ConfigOption = None, json_out: JsonFlag = False) -> None:
    """Show what the agent of this node holds: memory, disk and bucket of each namespace, hits, troubles.

    Exit code 1 when no agent runs, or it is not ready.
    """
    settings = load_config(config)
    if settings.agent.mode == "inprocess":
        raise ConfigError("agent.mode: inprocess: there is no agent; each engine counts for itself")
    report = read_status(settings)
    if json_out:
        typer.echo(json.dumps(report))
    else:
        _show(report)
    if not report["ready"]:
        raise typer.Exit(1)


def read_status(config: Config) -> dict[str, Any]:
    """Ask the agent that a configuration means.

    Returns:
        "directory" and "mode" of the agent; "running"; "ready"; "address" of its metrics, or None. If it runs
        also "agent", its own figures, and "namespaces", those of each store, named as in /metrics without
        `kvtier_agent_` and `kvtier_`.
    """
    from kvtier.agent.place import HTTP, agent_directory

    directory = agent_directory(config)
    report: dict[str, Any] = {
        "directory": str(directory),
        "mode": config.agent.mode,
        "running": False,
        "ready": False,
        "address": None,
    }
    address = config.agent.http or _written_address(directory / HTTP)
    if address is not None:
        report["address"] = address
        try:
            ready, _ = _get(address, "/readyz")
            _, text = _get(address, "/metrics")
            report["agent"], report["namespaces"] = _figures(text)
            report["running"], report["ready"] = True, ready == 200
        except TierUnavailable:
            report["address"] = None
    return report


def _written_address(file: Path) -> str | None:
    try:
        with open(file, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as text:
            return text.read(_MOST_ADDRESS_BYTES).strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _get(address: str, path: str) -> tuple[int, str]:
    host, _, port = address.rpartition(":")
    try:
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_SECONDS)
        try:
            connection.request("GET", path)
            reply = connection.getresponse()
            return reply.status, reply.read(_MOST_REPLY_BYTES).decode()
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise TierUnavailable(f"{address}: {error}") from error


def _figures(text: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Read the agent's own figures, and those of each namespace, out of its metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    own: dict[str, float] = {}
    stores: dict[str, dict[str, float]] = defaultdict(dict)
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except (ValueError, KeyError, IndexError) as error:
        raise TierUnavailable(f"what answers there has no metrics of an agent: {error}") from error
    for sample in samples:
        namespace = sample.labels.get("namespace", "")
        if sample.name.startswith(_AGENT):
            own[sample.name.removeprefix(_AGENT)] = sample.value
        elif sample.name.startswith(_STORE) and _NAMESPACE.fullmatch(namespace):
            stores[namespace][sample.name.removeprefix(_STORE)] = sample.value
    if "arena_bytes" not in own:
        raise TierUnavailable("what answers there is no agent")
    return own, dict(stores)


def _show(report: Mapping[str, Any]) -> None:
    if not report["running"]:
        start = "the first engine starts one" if report["mode"] == "auto" else "start it: kvtier agent"
        typer.echo(f"no agent answers in {report['directory']}; {start}")
        return
    own: Values = report["agent"]
    state = "ready" if report["ready"] else "NOT READY"
    typer.echo(
        f"agent in {report['directory']}: {state}, {own.get('clients', 0):.0f} clients, "
        f"{_size(own, 'arena_bytes')} of memory, metrics on http://{report['address']}/metrics"
    )
    console = Console()
    for name, values in report["namespaces"].items():
        typer.echo(f"\nnamespace {name}: {_lookups(values)}")
        table = Table("tier", "blocks", "size", "of", "loaded", "state")
        for column in table.columns[1:5]:
            column.justify = "right"
        for row in _rows(values):
            table.add_row(*row)
        console.print(table)


def _lookups(values: Values) -> str:
    hits = sum(value for name, value in values.items() if name.startswith("hit_blocks_"))
    asked = hits + values.get("missed_blocks", 0)
    share = f" ({hits / asked:.0%})" if asked else ""
    return (
        f"{values.get('lookups', 0):.0f} lookups found {hits:.0f} of {asked:.0f} blocks{share}; "
        f"{values.get('saved_blocks', 0):.0f} saved"
    )


def _rows(values: Values) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for tier, blocks in (("memory", "memory_blocks"), ("disk", "disk_blocks"), ("s3", "s3_blocks_known")):
        if blocks in values:
            sizes = (_size(values, f"{tier}_{what}_bytes") for what in ("size", "capacity"))
            loaded = values.get(f"hit_blocks_{tier}", 0)
            rows.append((tier, f"{values[blocks]:.0f}", *sizes, f"{loaded:.0f}", _state(tier, values)))
    return rows


def _state(tier: str, values: Values) -> str:
    """Say what is wrong with a tier and what is under way, as far as its figures tell."""
    if tier == "memory":
        return f"{values.get('memory_pinned', 0):.0f} of {values.get('memory_slots', 0):.0f} slots leased"
    said = []
    if tier == "disk" and not values.get("disk_writable", 1):
        said.append("not written")
    if tier == "s3":
        if not values.get("s3_ready", 1):
            said.append("index not loaded")
        if values.get("s3_breaker_open"):
            said.append("not read for now")
        if values.get("s3_write_breaker_open"):
            said.append("not written for now")
        if values.get("s3_quarantined_blocks"):
            said.append(f"{values['s3_quarantined_blocks']:.0f} blocks damaged")
        if values.get("s3_pending_bytes"):
            said.append(f"{_size(values, 's3_pending_bytes')} on their way")
    errors = f"{tier}_errors_"
    said += [
        f"{value:.0f} x {name.removeprefix(errors)}"
        for name, value in values.items()
        if name.startswith(errors) and value
    ]
    return ", ".join(said) or "ok"


def _size(values: Values, name: str) -> str:
    return format_size(int(values[name])) if name in values else ""
