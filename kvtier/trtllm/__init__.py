"""The TensorRT-LLM KV cache connector: a leader that promises blocks and workers that move them."""

from kvtier.connector.guard import BrokenPromise
from kvtier.trtllm.leader import KvTierConnectorLeader
from kvtier.trtllm.worker import KvTierConnectorWorker

__all__ = ["BrokenPromise", "KvTierConnectorLeader", "KvTierConnectorWorker"]
