"""Shared by the agent's tests: agents in real processes and in threads, and clients of them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvtier.agent.client import AgentClient, Deadlines, connect
from kvtier.agent.place import take_lock
from kvtier.agent.process import serve
from kvtier.agent.server import Agent
from kvtier.agent.stores import Stores
from kvtier.config import AgentConfig, Config, MemoryConfig
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store import TieredStore
from kvtier.tiers import Tier
from tests.store_support import LAYOUT

PATIENT = Deadlines(match=20.0, call=20.0)
"""For tests of what an agent does: on a busy machine it may take its time."""

PROCESSES = multiprocessing.get_context("forkserver")
"""Starts processes from one that has imported everything already: an agent then starts in milliseconds."""

PROCESSES.set_forkserver_preload(["tests.agent_support", "kvtier.engine", "kvtier.trtllm"])


TWO_SHARDS = BlockLayout("bfloat16", tokens_per_block=4, layers=2, kv_factor=2, row_elements=64, shards=2)


def namespace_of(layout: BlockLayout = LAYOUT, **facts: object) -> Namespace:
    """Return a namespace of its own for each set of facts."""
    return Namespace.from_facts({"model": "test", **layout.describe(), **facts})


def stride_of(layout: BlockLayout) -> int:
    """Return the bytes that a slot takes."""
    return -(-layout.block_bytes // 4096) * 4096


def configure(directory: Path, memory: int, **settings: Any) -> Config:
    """Return a configuration, with less memory than a file may ask for: a few slots are enough."""
    return Config(
        memory=MemoryConfig.model_construct(size=memory),
        agent=AgentConfig(mode="external", directory=directory),
        **settings,
    )


def serve_place(config: Config, environment: dict[str, str]) -> None:
    """Be an agent: what an `AgentProcess` does."""
    # The fork server's environment is that of the test which started it, without later ones' credentials.
    os.environ.update(environment)
    logging.basicConfig(level=logging.INFO, filename=config.agent.directory / "log", force=True)
    serve(config)
    os._exit(0)


class Place:
    """A directory for one agent, with a name that is short enough, and the configuration that means it."""

    def __init__(self, memory: int = 16 * 4096, **settings: Any) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="kvt", dir="/tmp"))
        self.memory = memory
        self.config = configure(self.directory, memory, **settings)

    def connect(
        self, namespace: Namespace | None = None, layout: BlockLayout = LAYOUT, **options: Any
    ) -> AgentClient:
        """Attach to the agent here."""
        options = {"deadlines": PATIENT, **options}
        client = connect(self.config, namespace or namespace_of(layout), layout, **options)
        if options.get("wait", 1) and options.get("ranks", 1) == 1:
            assert client.connected, self.log()
        return client

    def log(self) -> str:
        """Return what the agent has logged."""
        file = self.directory / "log"
        return file.read_text() if file.exists() else ""

    def remove(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.directory)


class AgentProcess:
    """An agent in a process of its own, at a place."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.process = PROCESSES.Process(target=serve_place, args=(place.config, dict(os.environ)))
        self.process.start()

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        """The process's id."""
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join(30)

    def end(self) -> int | None:
        """End the process properly; returns its exit code."""
        if self.process.is_alive():
            self.send(signal.SIGCONT)
            self.process.terminate()
        self.process.join(30)
        return self.process.exitcode


class AgentThread:
    """An agent in a thread of this process, over tiers that the test holds."""

    def __init__(
        self,
        place: Place,
        tiers: Sequence[Tier] = (),
        clock: Callable[[], float] = time.monotonic,
        linger: float | None = None,
        slot_format: str = "raw",
    ) -> None:
        lock = take_lock(place.directory)
        assert lock is not None
        self._lock = lock
        self.stores = Stores(
            place.memory, lambda namespace, layout: tiers, slot_format=slot_format, clock=clock
        )
        self.agent = Agent(place.directory, self.stores, linger=linger)
        self.thread = threading.Thread(target=self.agent.run, args=(10.0,), daemon=True)
        self.thread.start()

    def __enter__(self) -> AgentThread:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop the agent and wait for it."""
        self.agent.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def store_of(agent: AgentThread) -> TieredStore:
    """Return the only store that an agent has open."""
    (opened,) = agent.stores.open_stores()
    return opened.store


def eventually(condition: Callable[[], object], what: str = "", seconds: float = 60.0) -> None:
    """Wait for a condition that comes true by itself; it has a minute, which only a defect needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)
