"""What the scheduler's half tells the workers' each step, and what these tell back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


class Load(NamedTuple):
    """Blocks of one request to be copied from the arena before the forward pass.

    Attributes:
        lease: The claim on the slots; each rank releases it when its copies are done. 0: it is lost, and the
            pages are to be reported as not loaded.
        slots: Slot of each block.
        pages: The block id of each in the engine's pool.
    """

    lease: int
    slots: tuple[int, ...]
    pages: tuple[int, ...]


class Save(NamedTuple):
    """A block to be copied into the arena.

    Attributes:
        ticket: The reservation of its slot.
        page: Its block id in the engine's pool.
    """

    ticket: int
    page: int


@dataclass(frozen=True, slots=True)
class ConnectorMeta(KVConnectorMetadata):  # type: ignore[misc]
    """The orders of one step.

    Attributes:
        step: Number of the step, from 1.
        settled: The last step with a failed load that the scheduler has heard of. A worker that knows of a
            later one saves nothing: what was computed over missing blocks must not be stored.
        behind: The last step whose saves must have read their pages before anything is written: those pages
            were freed since. 0: none was.
        loads: To be done before the forward pass.
        tails: Blocks of finished requests, to be read before the forward pass.
        saves: To be done after it.
    """

    step: int
    settled: int = 0
    behind: int = 0
    loads: tuple[Load, ...] = ()
    tails: tuple[Save, ...] = ()
    saves: tuple[Save, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerMeta(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """What a worker tells the scheduler at the end of a step.

    Attributes:
        step: The step.
        failed: The last step whose loads failed, 0 if there was none.
    """

    step: int
    failed: int = 0

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerMeta:
        """Return what two workers say together."""
        return WorkerMeta(max(self.step, other.step), max(self.failed, other.failed))
