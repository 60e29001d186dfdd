"""How a client finds its agent: it attaches to the one that listens, or has one started."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import zmq

from kvtier._logging import log_once
from kvtier.agent import wire
from kvtier.agent.connection import Connection, attach
from kvtier.agent.mapping import Mappings
from kvtier.errors import KvTierError

_log = logging.getLogger(__name__)

FIRST_LAUNCH_SECONDS = 2.0
LAST_LAUNCH_SECONDS = 60.0
"""Pauses between starts of agents: they double while agents keep dying."""


class Dialler:
    """Tries to attach, once a call; `attach` and `close` are for one thread, `stop` for any.

    Args:
        directory: The agent's directory.
        hello: What to attach to.
        mappings: Where the arenas go.
        launch: Called when no agent listens, says whether it has started one; None: others start it.
    """

    def __init__(
        self,
        directory: Path,
        hello: wire.Attach,
        mappings: Mappings,
        launch: Callable[[], bool] | None,
    ) -> None:
        self._directory = directory
        self._hello = hello
        self._mappings = mappings
        self._launch = launch
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._lock = threading.Lock()
        self._dialled: socket.socket | None = None
        self._stopped = False
        self._next_launch = 0.0
        self._launch_pause = FIRST_LAUNCH_SECONDS

    def attach(self) -> Connection | None:
        """Try to attach to the agent; None if that fails, and then one may have been started."""
        door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        with self._lock:
            if self._stopped:
                door.close()
                return None
            self._dialled = door
        try:
            return attach(self._directory, self._hello, self._mappings, self._context, door)
        except (FileNotFoundError, ConnectionRefusedError):
            self._start_agent()
        except wire.VersionMismatch as error:
            log_once(
                _log,
                "version",
                "the agent in %s speaks another protocol, everything is a miss: %s",
                self._directory,
                error,
            )
        except (wire.WireError, KvTierError, OSError, ValueError) as error:
            log_once(_log, "attach", "cannot attach to the agent in %s: %s", self._directory, error)
        finally:
            with self._lock:
                self._dialled = None
        return None

    def stop(self) -> None:
        """End the attempt that is under way, and make all others fail."""
        with self._lock:
            self._stopped = True
            if self._dialled is not None:
                with suppress(OSError):
                    self._dialled.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Free what connections were made of; they have ended."""
        self._context.term()

    def _start_agent(self) -> None:
        now = time.monotonic()
        if self._launch is None or now < self._next_launch:
            return
        if now > self._next_launch + LAST_LAUNCH_SECONDS:
            self._launch_pause = FIRST_LAUNCH_SECONDS
        try:
            if self._launch():
                self._next_launch = now + self._launch_pause
                self._launch_pause = min(2 * self._launch_pause, LAST_LAUNCH_SECONDS)
        except (KvTierError, OSError) as error:
            self._next_launch = now + LAST_LAUNCH_SECONDS
            log_once(_log, "launch", "no agent can be started, everything is a miss: %s", error)
