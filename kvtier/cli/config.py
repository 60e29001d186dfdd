"""`kvtier config`: what a configuration file may say, and what a given one means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kvtier.config import VARIABLE, describe, json_schema, load_config
from kvtier.errors import ConfigError

app = typer.Typer(help="Check and describe configuration files.", no_args_is_help=True)


@app.command()
def schema() -> None:
    """Print the JSON schema (2020-12) of the configuration file."""
    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(help=f"The file; by default the one that {VARIABLE} names.")
    ] = None,
) -> None:
    """Check a configuration file and say in plain words what it means; exit code 2 when it cannot be used."""
    try:
        config = load_config(file)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    for line in describe(config):
        typer.echo(line)
