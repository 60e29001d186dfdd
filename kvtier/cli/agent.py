"""`kvtier agent`: the process that owns memory and tiers for all engines of a node."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvtier.config import VARIABLE, load_config
from kvtier.errors import ConfigError


def agent(
    config: Annotated[
        Path | None, typer.Option(help=f"The configuration file; by default the one that {VARIABLE} names.")
    ] = None,
) -> None:
    """Serve memory and tiers to the engines of this node, until SIGTERM."""
    # Codec kernels and the messaging library: not needed by the other commands.
    from kvtier.agent.process import serve

    settings = load_config(config)
    if settings.agent.mode == "inprocess":
        raise ConfigError('agent.mode: "inprocess" means that no agent runs; allowed here: auto, external')
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    serve(settings)
    # Threads that wait for a dead disk or bucket must not keep the process.
    sys.stdout.flush()
    logging.shutdown()
    os._exit(0)
