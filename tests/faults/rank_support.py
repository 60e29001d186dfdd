"""Engines in processes of their own that work through an agent, and what they hold: for tests of faults."""

from __future__ import annotations

import os
import re
import signal
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtier.agent import link
from kvtier.agent.client import connect
from kvtier.agent.place import HTTP
from kvtier.connector import shared
from kvtier.engine import Engine, EngineConfig, HashModel, Request
from kvtier.engine.group import RankLost
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.agent_support import PROCESSES, Place, eventually
from tests.e2e.test_connector_schedules import TOKENS_PER_BLOCK
from tests.unit.test_engine_ranks import alive

MODEL = {"layers": 3, "kv_heads": 4, "head_dim": 64}
ARENA = "memfd:kvtier-arena"

Holding = dict[str, int]
"""How many descriptors of each kind, threads and mapped arenas a process has."""

_later = [0.0]


def _clock() -> float:
    return time.monotonic() + _later[0]


def holding(pid: int | str = "self") -> Holding:
    """Count what a process holds; what it lets go of at this moment is not counted."""
    kinds: Counter[str] = Counter(threads=len(os.listdir(f"/proc/{pid}/task")))
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            name = os.readlink(f"/proc/{pid}/fd/{fd}")
            kinds["disk" if "/disk/" in name else re.split(r"[\[:0-9]", name)[0]] += 1
        except OSError:
            continue
    inodes = {line.split()[4] for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if ARENA in line}
    kinds["arenas"] = len(inodes)
    return dict(kinds)


class CountedWorker(KvTierConnectorWorker):
    """Tells in its statistics what its process holds, with arenas of dead agents past their time."""

    def __init__(self, llm_args: Any) -> None:
        # In each rank's process: agents come back at once, and the clock can be put forward.
        link.LAST_RETRY_SECONDS = 0.05
        shared.connect = partial(connect, clock=_clock)
        super().__init__(llm_args)

    def stats(self) -> Mapping[str, Any]:
        _later[0] += 100.0
        client = self._runtime.store_of(self._rank)
        if client is not None:
            client._link._ring()
        return {"holding": holding()}


def use_model(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let engines, in all processes, have a model whose files say which one it is."""
    monkeypatch.setenv("KVTIER_TEST_MODEL", HashModel(**MODEL, directory=directory / "model").path)


def make_engine(ranks: int, connected: bool = True) -> Engine:
    """Start an engine whose next token depends on every byte of KV that any rank reads."""
    torch.set_num_threads(1)
    config = EngineConfig(
        num_blocks=64,
        tokens_per_block=TOKENS_PER_BLOCK,
        version="1.3",
        tensor_parallel_size=ranks,
        max_tokens_per_step=32,
        overlap=True,
    )
    connector = {"leader_class": KvTierConnectorLeader, "worker_class": CountedWorker} if connected else {}
    model = HashModel(**MODEL)
    model.path = os.environ["KVTIER_TEST_MODEL"]
    return Engine(model, config, **connector)


def answers(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
    """Return what an engine whose own cache is empty answers."""
    engine.cache.pool.forget()
    ids = [engine.submit(request) for request in requests]
    engine.settle()
    engine.idle(2)
    return [engine.output(request_id) for request_id in ids]


def _be_engine(ranks: int, orders: Connection, environment: Mapping[str, str]) -> None:
    # The server that this process was forked from is older than the test.
    os.environ.update(environment)
    # The same server makes this engine's ranks; one of this process's own would import everything anew.
    forkserver._forkserver.ensure_running = lambda: None
    try:
        engine = make_engine(ranks)
        orders.send([os.getpid(), *(process.pid for process in engine.ranks.processes)])
        while True:
            order, arguments = orders.recv()
            if order == "answer":
                orders.send(answers(engine, *arguments))
            elif order == "loaded":
                orders.send(sum(sequence.metrics.tokens_external for sequence in engine._sequences.values()))
            elif order == "leader":
                orders.send(engine.connector.leader.stats())
            else:
                orders.send(engine.ranks.stats())
    except (EOFError, RankLost):
        return
    except BaseException as error:
        orders.send(repr(error))
        raise


class EngineProcess:
    """An engine: the process of the leader and rank 0, and one for each other rank.

    Attributes:
        pids: Their ids, the leader's first.
    """

    def __init__(self, ranks: int) -> None:
        self._orders, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_be_engine, args=(ranks, theirs, dict(os.environ)))
        self._process.start()
        theirs.close()
        pids = self._orders.recv()
        assert isinstance(pids, list), pids
        self.pids: list[int] = pids

    def order(self, order: str, *arguments: Any) -> None:
        """Tell the engine what to do."""
        self._orders.send((order, arguments))

    def result(self) -> Any:
        """Return what came of it; None when the engine has ended.

        Raises:
            AssertionError: The engine died of an error.
        """
        try:
            result = self._orders.recv()
        except (EOFError, ConnectionResetError):
            return None
        assert not isinstance(result, str), f"the engine died: {result}"
        return result

    def ask(self, order: str, *arguments: Any) -> Any:
        """Do both."""
        self.order(order, *arguments)
        return self.result()

    def holdings(self) -> list[Holding]:
        """Return what each of its processes holds."""
        return [stats["holding"] for stats in self.ask("stats")]

    def kill(self) -> None:
        """End it at once; a second call does nothing."""
        for pid in self.pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

    def bury(self) -> None:
        """Wait until none of its processes is left."""
        self._orders.close()
        self._process.join(60)
        assert self._process.exitcode is not None, "the engine does not end"
        self._process.close()
        eventually(lambda: not any(alive(pid) for pid in self.pids), "all ranks end")


def metrics(place: Place) -> dict[str, float]:
    """Return what the agent at a place counts, without names of namespaces; nothing if it does not answer."""
    try:
        address = (place.directory / HTTP).read_text().strip()
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:
        return {}
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.partition("{")[0].removeprefix("kvtier_"): float(value) for name, value in pairs}


def sockets(place: Place) -> Counter[str]:
    """Count the sockets of this machine that have a name in a place's directory, by file."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return Counter(line.rpartition("/")[2] for line in lines if f" {place.directory}/" in line)
