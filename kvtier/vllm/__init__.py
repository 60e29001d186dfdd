"""The vLLM KV cache connector: one class, of which the scheduler has one instance and each worker another."""

from kvtier.vllm.connector import KvTierConnector

__all__ = ["KvTierConnector"]
