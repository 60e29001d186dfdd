"""The demo's nodes: a directory, a configuration and an agent each."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kvtier.agent.place import LOCK, take_lock
from kvtier.errors import KvTierError

END_SECONDS = 90.0
"""What an agent may take to write what is pending, and to end."""


class Node:
    """A machine, as far as kvtier is concerned.

    Attributes:
        config: The configuration file of its engines.
    """

    def __init__(self, bucket: Mapping[str, Any], directory: Path, sockets: Path) -> None:
        """Write the node's configuration.

        Args:
            bucket: The section `s3`.
            directory: For its disk and its files.
            sockets: The agent's directory; its path is short.
        """
        directory.mkdir()
        self.config = directory / "kvtier.yaml"
        self._sockets = sockets
        # What the agent has counted in the acts before.
        self._counted: Counter[str] = Counter()
        settings = {
            "memory": {"size": "1GiB"},
            "disk": {"path": str(directory / "disk"), "size": "1GiB"},
            "s3": dict(bucket),
            "agent": {"mode": "auto", "directory": str(sockets)},
            # Prefill takes seconds on a CPU, so waiting for the whole prefix always wins here.
            "lookup_wait": "5s",
            "flush_timeout": "60s",
        }
        self.config.write_text(yaml.safe_dump(settings))

    def newly_counted(self, counters: Mapping[str, int]) -> dict[str, int]:
        """Return by how much the agent's counters have grown since this was asked last."""
        grown = {name: value - self._counted[name] for name, value in counters.items()}
        self._counted.update(grown)
        return grown

    def end_agent(self) -> None:
        """End the node's agent, if it has one, as a service manager would.

        Raises:
            KvTierError: It does not end; it is killed.
        """
        self._counted.clear()
        if not self._sockets.exists():
            return
        deadline = time.monotonic() + END_SECONDS
        told = False
        while (lock := take_lock(self._sockets)) is None:
            text = (self._sockets / LOCK).read_text()
            if text and not told:
                os.kill(int(text), signal.SIGTERM)
                told = True
            if time.monotonic() > deadline:
                os.kill(int(text), signal.SIGKILL)
                raise KvTierError(f"an agent of the demo does not end: {self._sockets}")
            time.sleep(0.02)
        os.close(lock)
