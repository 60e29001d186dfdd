"""The class that vLLM loads: each call goes to the half that it concerns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from kvtier.vllm.metrics import ConnectorStats, PromMetrics

if TYPE_CHECKING:
    from kvtier.vllm.meta import ConnectorMeta, WorkerMeta
    from kvtier.vllm.scheduler import SchedulerHalf
    from kvtier.vllm.worker import WorkerHalf


class KvTierConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Puts kvtier under vLLM.

    It is chosen with `kv_connector_module_path: kvtier.vllm` and `kv_connector: KvTierConnector`, and finds
    its settings through `kv_connector_extra_config: {config: /path.yaml}` or KVTIER_CONFIG.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        """Make the half that is wanted.

        Raises:
            ConfigError: There is no configuration of kvtier, or it is wrong.
            LayoutError: A KV cache that kvtier does not support; the message says why.
        """
        super().__init__(vllm_config, role, kv_cache_config)
        # Not before: vLLM imports this module early, and its CPU build does not start when llvmlite, which
        # numba needs, is there before its own kernels are.
        from kvtier.vllm.scheduler import SchedulerHalf
        from kvtier.vllm.worker import WorkerHalf

        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerHalf(vllm_config, kv_cache_config)
        else:
            self._worker = WorkerHalf(vllm_config, kv_cache_config)
        self._counted: dict[str, int | float] = {}
        self._block_pool: Any = None

    @property
    def scheduler(self) -> SchedulerHalf:
        """The scheduler's half; only where the role is SCHEDULER."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def worker(self) -> WorkerHalf:
        """The worker's half; only where the role is WORKER."""
        assert self._worker is not None
        return self._worker

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that does not happen is a miss later, no more."""
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Ask for heads before tokens: blocks then lie in the pool as they are stored."""
        return None if vllm_config.model_config.use_mla else "HND"

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Promise blocks; see `SchedulerHalf.get_num_new_matched_tokens`."""
        return self.scheduler.get_num_new_matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note what the engine takes of a promise."""
        self.scheduler.update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> ConnectorMeta:
        """Give the orders of the coming step."""
        return self.scheduler.build_connector_meta(scheduler_output)

    def request_finished(
        self, request: Any, block_ids: Sequence[int]
    ) -> tuple[bool, Mapping[str, Any] | None]:
        """Note a request's end. Its pages are free: what is saved of them is read before the next pass."""
        self.scheduler.request_finished(request, block_ids)
        return False, None

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        """Take the engine's pool of blocks."""
        self._block_pool = gpu_block_pool

    def update_connector_output(self, connector_output: Any) -> None:
        """Hear what the workers have to tell; what was not loaded must not be found in the engine's cache."""
        spoilt = self.scheduler.update_connector_output(connector_output)
        if spoilt and self._block_pool is not None:
            self._block_pool.evict_blocks(spoilt)

    def take_events(self) -> Iterable[Any]:
        """Return no events: what kvtier holds, every engine of the cluster can load."""
        return ()

    def reset_cache(self) -> bool:
        """Forget everything, as far as this engine goes."""
        return self.scheduler.reset_cache()

    def register_kv_caches(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's pool; see `WorkerHalf.register`."""
        self.worker.register(kv_caches)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Take the orders of the coming step."""
        super().bind_connector_metadata(connector_metadata)
        self.worker.bind(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load promised blocks."""
        self.worker.load()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: loads stand in front of the whole pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: whole blocks are saved after the pass."""

    def wait_for_save(self) -> None:
        """Save whole blocks."""
        self.worker.save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return nothing: no load and no save keeps a request waiting."""
        return None, None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Name the pages that were promised and not loaded."""
        return self.worker.take_failed_pages()

    def build_connector_worker_meta(self) -> WorkerMeta:
        """Tell the scheduler's half that a step has ended, and of failed loads."""
        return self.worker.meta()

    def get_kv_connector_stats(self) -> ConnectorStats | None:
        """Return what was counted since the last call."""
        half = self._scheduler or self.worker
        counts = half.take_counts()
        new = {name: value - self._counted.get(name, 0) for name, value in counts.items()}
        self._counted = counts
        stats = ConnectorStats(data={name: value for name, value in new.items() if value})
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ConnectorStats | None:
        """Return counts that come from another process."""
        return ConnectorStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics:
        """Register the counters with vLLM's metrics."""
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Leave the store, which closes with its last user."""
        (self._scheduler or self.worker).close()
