"""The `kvtier` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvtier import __version__
from kvtier.cli import bucket as bucket_command
from kvtier.cli import config as config_command
from kvtier.cli.agent import agent as agent_command
from kvtier.cli.gc import gc as gc_command
from kvtier.cli.ls import ls as ls_command
from kvtier.cli.rebuild_index import rebuild_index as rebuild_index_command
from kvtier.cli.status import status as status_command
from kvtier.cli.verify import verify as verify_command
from kvtier.cli.warm import warm as warm_command
from kvtier.errors import KvTierError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure kvtier on this machine.", no_args_is_help=True)
app.add_typer(config_command.app, name="config")
app.command("agent")(agent_command)
app.command("status")(status_command)
app.add_typer(bucket_command.app, name="bucket")
app.command("ls")(ls_command)
app.command("verify")(verify_command)
app.command("rebuild-index")(rebuild_index_command)
app.command("gc")(gc_command)
app.command("warm")(warm_command)
app.add_typer(bench, name="bench")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kvtier {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """The KV cache that outlives the GPU."""


@bench.command("codec")
def bench_codec(
    input_file: Annotated[Path, typer.Option("--input", help="Real KV, an array of blocks: a .npy file.")],
    dtype: Annotated[str | None, typer.Option(help="KV dtype; default by item size.")] = None,
    json_out: JsonFlag = False,
) -> None:
    """Compare the block codec with plain zstd on real KV: ratio and MB/s, one core, paired."""
    from kvtier.cli.bench_codec import run

    run(input_file, dtype, json_out)


@bench.command("lookup")
def bench_lookup(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 100_000,
    tokens_per_block: Annotated[int, typer.Option(min=1, help="Tokens in a block.")] = 32,
    json_out: JsonFlag = False,
) -> None:
    """Time hashing and lookup of a long prompt."""
    from kvtier.cli.bench_lookup import run

    run(tokens, tokens_per_block, json_out)


@app.command()
def demo(
    config: Annotated[
        Path | None, typer.Option(help="Use the bucket of this file instead of starting a server.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, max=8000, help="Length of the prompt.")] = 2000,
    json_out: JsonFlag = False,
) -> None:
    """Compute a prefix once, restart on an empty node, load it from the bucket: in real processes."""
    from kvtier.cli.demo import run

    run(config, tokens, json_out)


def main() -> None:
    """Run the command line; errors that kvtier raises on purpose are one message and exit code 2."""
    try:
        app()
    except KvTierError as error:
        sys.stderr.write(f"kvtier: {error}\n")
        sys.exit(2)
