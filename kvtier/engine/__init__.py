"""The reference engine: a small paged engine that calls any connector in the real engine's order."""

from kvtier.engine.config import EngineConfig, Finished, Metrics, ModelSpec, Multimodal, Request
from kvtier.engine.engine import Engine
from kvtier.engine.hash_model import HashModel
from kvtier.engine.llama import LlamaConfig, LlamaModel, load_model
from kvtier.engine.llama_gpu import GpuLlama
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import Model, Span
from kvtier.engine.tokenizer import Tokenizer
from kvtier.engine.weights import model_dir

__all__ = [
    "Engine",
    "EngineConfig",
    "Finished",
    "GpuLlama",
    "HashModel",
    "KVMemory",
    "LlamaConfig",
    "LlamaModel",
    "Metrics",
    "Model",
    "ModelSpec",
    "Multimodal",
    "Request",
    "Span",
    "Tokenizer",
    "load_model",
    "model_dir",
]
