"""kvtier's counters in vLLM's metrics."""

from __future__ import annotations

from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "looked_up_tokens": "Prompt tokens looked up beyond vLLM's own prefix cache.",
    "promised_tokens_memory": "Of these, tokens that lay in host memory.",
    "promised_tokens_disk": "Of these, tokens that came from the local disk.",
    "promised_tokens_s3": "Of these, tokens that came from the bucket.",
    "loaded_tokens": "Tokens whose blocks were ordered to be loaded.",
    "loaded_blocks": "Blocks loaded, by all ranks.",
    "saved_blocks": "Blocks saved, by all ranks.",
    "save_failed_blocks": "Blocks that could not be saved.",
    "lost_promises": "Promises that were lost between lookup and load.",
    "load_failed_blocks": "Blocks that were promised and not loaded.",
    "failed_steps": "Steps with blocks that were not loaded.",
    "orders_given_up": "Loads and saves of steps that were called off.",
}
"""What is counted; errors of kvtier's own are counted as `errors_<method>` besides, and only logged."""


class ConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last look, by name."""

    data: dict[str, Any]

    def reset(self) -> None:
        """Start again."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> ConnectorStats:
        """Add the counts of another worker, or of a later time."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the counts, for the log."""
        return dict(self.data)

    def is_empty(self) -> bool:
        """Say whether nothing was counted."""
        return not self.data


class PromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:kvtier_<name>_total`, one series for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        """Register the counters."""
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: metric_types[Counter](
                name=f"vllm:kvtier_{name}", documentation=documentation, labelnames=labelnames
            )
            for name, documentation in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add the counts of one engine."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name in self._counters:
                self._counters[name].labels(*labels).inc(value)
