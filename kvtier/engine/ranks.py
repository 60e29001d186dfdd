"""The ranks of an engine: rank 0 in this process, each of the others in one of its own."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch

from kvtier.engine.config import EngineConfig
from kvtier.engine.group import RankError, RankLost
from kvtier.engine.model import Model
from kvtier.engine.rank import Rank, Work

CLOSE_SECONDS = 5.0

Result = TypeVar("Result")

# Its processes start from one that never had a thread or a CUDA context, and end when this one does.
_PROCESSES = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class _Part:
    """A member's part of a gather; it waits for all parts, or for None when another rank has failed."""

    data: bytes


@dataclass(frozen=True, slots=True)
class _Reply:
    """What came of an order: a value, or what went wrong."""

    value: Any = None
    error: str | None = None


class Ranks:
    """Gives the same orders to all ranks, in step.

    Attributes:
        here: Rank 0.
        processes: The processes of the other ranks, from rank 1 on.
    """

    def __init__(
        self, model: Model, config: EngineConfig, worker_class: type | None, arguments: Sequence[Any]
    ) -> None:
        """Start the other ranks' processes, which construct their workers at once.

        Args:
            model: The whole model; it can be pickled if there is more than one rank.
            config: The engine's settings.
            worker_class: The connector's worker, or None.
            arguments: For each rank what its worker is constructed with.
        """
        self._hub = _Hub()
        self.processes = []
        for rank in range(1, config.tensor_parallel_size):
            ours, theirs = _PROCESSES.Pipe()
            order = (theirs, rank, model, config, worker_class, arguments[rank], dict(os.environ))
            process = _PROCESSES.Process(target=_serve, args=order, name=f"rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._hub.connections.append(ours)
        self._model = model if config.tensor_parallel_size == 1 else model.shard(self._hub)
        self._config = config

    def open(self, worker: Any) -> None:
        """Make rank 0, given its worker, and wait until all ranks have registered their pools.

        Raises:
            RankError: A rank failed to.
            RankLost: A rank's process is gone.
        """
        self.here, _ = self._hub.gather_replies(lambda: Rank(self._model, self._config, worker))

    def begin(self, metadata: bytes) -> None:
        """Bind and load on all ranks; see `Rank.begin`."""
        self._everywhere("begin", metadata)

    def forward(self, work: Work) -> list[int | None]:
        """Compute on all ranks and return rank 0's tokens; see `Rank.forward`."""
        tokens: list[int | None] = self._everywhere("forward", work)[0]
        return tokens

    def poll(self, finished: list[int], started: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return each rank's finished saves and loads; see `Rank.poll`."""
        return self._everywhere("poll", finished, started)

    def stats(self) -> list[dict[str, int | float]]:
        """Return each rank's statistics."""
        return self._everywhere("stats")

    def close(self) -> None:
        """End the other ranks' processes."""
        for connection in self._hub.connections:
            connection.close()
        for process in self.processes:
            process.join(CLOSE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
        self.processes = []
        self._hub.connections = []

    def _everywhere(self, method: str, *arguments: Any) -> list[Any]:
        self._hub.send((method, arguments))
        value, others = self._hub.gather_replies(lambda: getattr(self.here, method)(*arguments))
        return [value, *others]


class _Hub:
    """Rank 0's end of the pipes to the others, and its place in their group."""

    def __init__(self) -> None:
        self.rank = 0
        self.connections: list[Connection] = []
        # Replies that came when a part was expected: their senders have failed.
        self._early: dict[Connection, _Reply] = {}

    @property
    def ranks(self) -> int:
        return 1 + len(self.connections)

    def send(self, order: tuple[str, Sequence[Any]]) -> None:
        for connection in self.connections:
            self._send(connection, order)

    def all_gather(self, part: bytes) -> list[bytes]:
        parts = [part]
        for connection in self.connections:
            message = self._receive(connection)
            if isinstance(message, _Part):
                parts.append(message.data)
            else:
                self._early[connection] = message
        if self._early:
            raise RankError("another rank failed")
        for connection in self.connections:
            self._send(connection, parts)
        return parts

    def gather_replies(self, own: Callable[[], Result]) -> tuple[Result, list[Any]]:
        """Do rank 0's part of an order and return what came of it, and the other ranks' values."""
        failure: Exception | None = None
        try:
            value = own()
        except RankLost:
            raise
        except Exception as error:  # noqa: BLE001 - raised again below, when all ranks are in step
            failure = error
        replies = [self._reply(connection) for connection in self.connections]
        for rank, reply in enumerate(replies, 1):
            if reply.error is not None and (failure is None or isinstance(failure, RankError)):
                failure = RankError(f"rank {rank}: {reply.error}")
        if failure is not None:
            raise failure
        return value, [reply.value for reply in replies]

    def _reply(self, connection: Connection) -> _Reply:
        """Return a member's reply; one that still waits for others' parts is told to give up."""
        message = self._early.pop(connection, None) or self._receive(connection)
        while isinstance(message, _Part):
            self._send(connection, None)
            message = self._receive(connection)
        return message

    def _receive(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except (EOFError, OSError) as error:
            raise RankLost(f"the process of rank {self.connections.index(connection) + 1} is gone") from error

    def _send(self, connection: Connection, message: Any) -> None:
        try:
            connection.send(message)
        except OSError as error:
            raise RankLost(f"the process of rank {self.connections.index(connection) + 1} is gone") from error


class _Member:
    """Another rank's place in the group."""

    def __init__(self, connection: Connection, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self._connection = connection

    def all_gather(self, part: bytes) -> list[bytes]:
        try:
            self._connection.send(_Part(part))
            parts: list[bytes] | None = self._connection.recv()
        except (EOFError, OSError) as error:
            raise RankLost("the process of rank 0 is gone") from error
        if parts is None:
            raise RankError("another rank failed")
        return parts


def _serve(
    connection: Connection,
    rank: int,
    model: Model,
    config: EngineConfig,
    worker_class: type | None,
    arguments: Any,
    environment: Mapping[str, str],
) -> None:
    """Be a rank, until rank 0's process closes the pipe or ends."""
    os.environ.clear()
    os.environ.update(environment)
    # Threads that OpenMP keeps spinning would take the cores from the other ranks.
    torch.set_num_threads(1)

    built: list[Rank] = []

    def build() -> None:
        shard = model.shard(_Member(connection, rank, config.tensor_parallel_size))
        worker = worker_class(arguments) if worker_class is not None else None
        built.append(Rank(shard, config, worker))

    try:
        connection.send(_attempt(build))
        while True:
            method, order = connection.recv()
            connection.send(_attempt(partial(getattr(built[0], method), *order)))
    except (EOFError, OSError, RankLost):
        return


def _attempt(action: Callable[[], Any]) -> _Reply:
    try:
        return _Reply(action())
    except RankLost:
        raise
    except Exception as error:  # noqa: BLE001 - told to rank 0, which raises it
        return _Reply(error=f"{type(error).__name__}: {error}")
