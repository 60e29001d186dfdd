"""What one rank does: its shard of the model, its KV pool, its half of the connector."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvtier.engine.config import EngineConfig
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import Model, Span

WARM_UP_FORWARDS = 2


@dataclass(frozen=True, slots=True)
class Work:
    """One forward pass, the same for all ranks.

    Attributes:
        spans: What to compute.
        garbage: Group and page of newly allocated pages, to be filled with garbage first.
        hooks: Whether the per-layer hooks run.
    """

    spans: Sequence[Span]
    garbage: Sequence[tuple[int, int]]
    hooks: bool


class Rank:
    """One rank of an engine.

    Attributes:
        memory: Its KV pool.
        worker: Its instance of the connector's worker class, or None.
    """

    def __init__(self, model: Model, config: EngineConfig, worker: Any) -> None:
        """Warm up, allocate the pool and show it to the worker.

        Args:
            model: This rank's shard.
            config: The engine's settings.
            worker: The connector's worker, or None.
        """
        self.worker = worker
        self._model = model
        self._forward_pass_callable: Any = None
        if worker is not None and config.version != "1.1":
            self._forward_pass_callable = worker.register_forward_pass_callable()
        # Warm-up forwards come before any registration.
        for _ in range(WARM_UP_FORWARDS):
            self._forward_passed()
        self.memory = KVMemory(model.spec, config)
        cuda = self.memory.device.type == "cuda"
        self._execution_stream = torch.cuda.Stream(self.memory.device) if cuda else None  # type: ignore[no-untyped-call]
        if worker is None:
            return
        if self.memory.layout is not None:
            worker.register_kv_cache_layout(self.memory.layout)
        else:
            worker.register_kv_caches(self.memory.tensor)

    def begin(self, metadata: bytes) -> None:
        """Bind an iteration's metadata, pickled by rank 0, and let the worker load."""
        # Both ends of this pickle are this program.
        self.worker.bind_connector_meta(pickle.loads(metadata))  # noqa: S301
        self.worker.start_load_kv(self._current_stream())

    def forward(self, work: Work) -> list[int | None]:
        """Compute, with the worker's hooks, and let it save; returns what the model returns."""
        for group, page in work.garbage:
            self.memory.fill(group, page)
        current = self._current_stream()
        if self._execution_stream is not None:
            self._execution_stream.wait_stream(current)
        with torch.cuda.stream(self._execution_stream):
            stream = self._current_stream()

            def before(layer: int) -> None:
                if work.hooks and self.worker is not None:
                    self.worker.wait_for_layer_load(layer, stream)

            def after(layer: int) -> None:
                if work.hooks and self.worker is not None:
                    self.worker.save_kv_layer(layer, stream)

            tokens = self._model.forward(work.spans, self.memory, before, after)
            self._forward_passed()
        if self._execution_stream is not None:
            current.wait_stream(self._execution_stream)
        if self.worker is not None:
            self.worker.wait_for_save(current)
        return tokens

    def poll(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        """Ask the worker which saves and loads are over."""
        saved, loaded = self.worker.get_finished(finished, started)
        return saved, loaded

    def stats(self) -> dict[str, int | float]:
        """Return the worker's statistics, where it has any."""
        return dict(self.worker.stats()) if hasattr(self.worker, "stats") else {}

    def _forward_passed(self) -> None:
        if self._forward_pass_callable is not None:
            self._forward_pass_callable()

    def _current_stream(self) -> Any:
        device = self.memory.device
        return torch.cuda.current_stream(device) if device.type == "cuda" else None
