"""The agent's process: lock, signals, health, and a clean end."""

from __future__ import annotations

import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path

# Here, so that an engine's first store does not wait for the compiler.
import kvtier.codec.native
import kvtier.codec.nibble_codec  # noqa: F401
from kvtier.agent.http import HealthServer
from kvtier.agent.place import (
    HTTP,
    LOCK,
    agent_directory,
    identity,
    keep,
    make_directory,
    remove_own,
    take_lock,
)
from kvtier.agent.room import ask_for_room
from kvtier.agent.server import Agent
from kvtier.agent.stores import Stores
from kvtier.config import Config
from kvtier.errors import ConfigError
from kvtier.store import open_tiers

_log = logging.getLogger(__name__)

_SWITCH_SECONDS = 0.0005
"""How long another thread may keep the interpreter from the one that answers requests."""


def serve(config: Config, *, lock: int | None = None, linger: float | None = None) -> None:
    """Run an agent in this process until SIGTERM or SIGINT.

    Args:
        config: What to serve.
        lock: Descriptor that holds the directory's lock; None to take it.
        linger: Seconds without clients after which it ends by itself; None: never.

    Raises:
        ConfigError: Another agent runs there, or something cannot be opened as configured.
    """
    directory = agent_directory(config)
    make_directory(directory)
    try:
        if lock is None and (lock := take_lock(directory)) is None:
            raise ConfigError(f"{directory}: an agent runs here already, or has not ended yet")
    except OSError as error:
        raise ConfigError(f"{directory}: cannot hold the agent's files: {error.strerror}") from error
    kept = keep(directory)
    try:
        # For people, and for tests that kill it.
        os.truncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        _log.warning("%s does not tell the agent's process: %s", directory / LOCK, error.strerror)
    if config.agent.directory is None:
        ask_for_room(directory, config.flush_timeout)
    sys.setswitchinterval(_SWITCH_SECONDS)
    stores = Stores(
        config.memory.size,
        partial(open_tiers, config),
        slot_format=config.memory.format,
        flush_timeout=config.flush_timeout,
    )
    try:
        agent = Agent(directory, stores, linger=linger)
    except OSError as error:
        raise ConfigError(f"{directory}: the agent cannot listen: {error.strerror or error}") from error
    try:
        health = HealthServer(agent, config.agent.http)
    except OSError as error:
        raise ConfigError(
            f"the agent cannot listen on {config.agent.http or 'loopback'}: {error.strerror or error}; "
            "allowed as agent.http: an address of this machine with a port that nobody uses"
        ) from error
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    try:
        _write(directory / HTTP, f"{health.address}\n")
    except OSError as error:
        # It serves all the same: `kvtier status` does not find it, unless agent.http says where it is.
        _log.warning("%s cannot be written: %s", directory / HTTP, error.strerror)
    address = identity(directory / HTTP)
    _log.info("the agent serves in %s, health on http://%s", directory, health.address)
    agent.run(config.flush_timeout)
    health.close()
    remove_own(directory / HTTP, address)
    _log.info("the agent has ended")
    for fd in (kept, lock):
        if fd is not None:
            os.close(fd)


def _write(path: Path, text: str) -> None:
    """Write a small file so that nobody ever sees half of it."""
    draft = path.with_suffix(".new")
    draft.write_text(text)
    draft.replace(path)
