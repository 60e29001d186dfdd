"""What the commands that look into the bucket share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kvtier._counters import Counters
from kvtier.config import VARIABLE, S3Config, load_config
from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.tiers.s3.bucket import Bucket

T = TypeVar("T")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help=f"The configuration file; by default the one that {VARIABLE} names."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")]


def bucket_settings(path: Path | None) -> S3Config:
    """Return the section `s3` of a configuration.

    Raises:
        ConfigError: The file is wrong, or has no such section.
    """
    config = load_config(path)
    if config.s3 is None:
        raise ConfigError("the configuration has no section s3: there is no bucket")
    return config.s3


@contextmanager
def opened_bucket(config: S3Config) -> Iterator[Bucket]:
    """Give the bucket of a configuration, and close its connections afterwards."""
    # The S3 clients take half a second to import, which other commands need not pay.
    from kvtier.tiers.s3.open_bucket import open_bucket

    bucket = open_bucket(config, Counters())
    try:
        yield bucket
    finally:
        bucket.close()


def read_option(option: str, text: str, parse: Callable[[object], T]) -> T:
    """Return the value of an option.

    Args:
        option: Its name, with dashes.
        text: What stands behind it.
        parse: Reads it, or raises ValueError with what is allowed.

    Raises:
        ConfigError: It is no such value.
    """
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f'{option}: "{text}" {error}') from error


def nothing_there(config: S3Config) -> str:
    """Say that the bucket holds nothing of kvtier's."""
    return f"nothing below {config.prefix}/ in {config.bucket}"


def left_alone(name: str, other: int) -> str:
    """Say that a namespace is not looked at, being in a format that this version does not know."""
    return f"{name}: left alone, another version of kvtier writes it (format {other})"


def shows_progress(json_out: bool) -> bool:
    """Whether somebody watches standard error."""
    return not json_out and sys.stderr.isatty()
