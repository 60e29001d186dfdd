"""What the engine's arguments say about the KV cache, and the namespace that follows from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtier.connector.weights import model_config, model_facts, private_facts
from kvtier.errors import LayoutError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.trtllm.fields import as_int, as_list, as_plain, as_text, dig
from kvtier.trtllm.interface import world_size

DEFAULT_TOKENS_PER_BLOCK = 32
"""The engine's own default."""

_DTYPES = {
    "fp8": "float8_e4m3fn",
    "e4m3": "float8_e4m3fn",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float": "float32",
}
_QUANTIZATION = (
    "group_size",
    "smoothquant_val",
    "clamp_val",
    "use_meta_recipe",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
)
"""How weights and activations are quantized, besides the algorithm. Scales stand in the weight files."""
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The engine's arguments, as far as they concern the KV cache. Missing ones have the engine's defaults.

    Attributes:
        model: Identity of the model and its weights, plain JSON data.
        numerics: Other arguments that change the bytes of a block: dtype, quantization, attention backend.
        tokens_per_block: Tokens in a block, None if not given.
        kv_dtype: torch's name of the KV dtype that was asked for, None for "auto".
        ranks: Processes that each hold a shard.
        plain_ranks: No pipeline or context parallelism: every rank has all layers of its heads.
        host_cache_bytes: Size of the engine's own host and disk tiers below the GPU.
        attention_layers: Layers with a KV cache, None where not known for certain.
        window: Tokens of the sliding window that the KV cache is limited to, None without one.
        head_elements: Elements of one token's keys (or values) in one layer of one rank, None if not known.
        latent_elements: The same of a token's latent, for models with MLA.
        head_dim: Elements of one head of one token, None if not known.
    """

    model: Mapping[str, Any]
    numerics: Mapping[str, Any]
    tokens_per_block: int | None
    kv_dtype: str | None
    ranks: int
    plain_ranks: bool
    host_cache_bytes: int
    attention_layers: int | None
    window: int | None
    head_elements: int | None
    latent_elements: int | None
    head_dim: int | None
    model_dtype: str | None = field(compare=False)

    @classmethod
    def read(cls, llm_args: object) -> EngineFacts:
        """Read the engine's arguments; what is missing or of another type counts as not given."""
        model, revision = as_text(dig(llm_args, "model")), as_text(dig(llm_args, "revision"))
        config = model_config(model, revision)
        ranks = (
            as_int(dig(llm_args, "tensor_parallel_size")),
            as_int(dig(llm_args, "parallel_config", "world_size")),
            world_size(),
        )
        others = [as_int(dig(llm_args, f"{kind}_parallel_size")) or 1 for kind in ("pipeline", "context")]
        dummy = (as_text(dig(llm_args, "load_format")) or "").lower() == "dummy"
        # Random weights, whatever the model's files say.
        identity = private_facts(model) if dummy else model_facts(model, revision)
        tiers = [
            as_int(dig(llm_args, "kv_cache_config", f"{kind}_cache_size")) or 0 for kind in ("host", "disk")
        ]
        return cls(
            model=identity,
            numerics=_numerics(llm_args, config),
            tokens_per_block=as_int(dig(llm_args, "kv_cache_config", "tokens_per_block")),
            kv_dtype=_kv_dtype(llm_args, identity),
            ranks=max(1, *(known or 1 for known in ranks)),
            plain_ranks=max(others) == 1,
            host_cache_bytes=sum(tiers),
            attention_layers=_attention_layers(config),
            window=_window(llm_args),
            head_elements=_head_elements(config, llm_args),
            latent_elements=_latent_elements(config),
            head_dim=_head_dim(config),
            model_dtype=as_text(config.get("torch_dtype") or config.get("dtype")),
        )

    def canonical(self) -> str:
        """Return a text that is equal for equal facts, and only for those."""
        return json.dumps(
            [self.model, self.numerics, self.tokens_per_block, self.kv_dtype, self.ranks], sort_keys=True
        )

    def namespace(self, layout: BlockLayout, pool: Mapping[str, Any]) -> Namespace:
        """Return the namespace of blocks of this layout.

        Args:
            layout: Geometry of a block; its dtype is the pool's own.
            pool: What else tells one arrangement of the pool from another, plain JSON data.
        """
        asked = {"kv_dtype": self.kv_dtype} if self.kv_dtype not in (None, layout.dtype) else {}
        return Namespace.from_facts(
            {
                "engine": "tensorrt_llm",
                "model": self.model,
                "numerics": self.numerics,
                "tensor_parallel_size": self.ranks,
                "layout": layout.describe(),
                "pool": pool,
                **asked,
            }
        )

    def refuse_unsupported(self) -> None:
        """Refuse what no pool can make good.

        Raises:
            LayoutError: The engine moves blocks between the GPU and a tier of its own.
        """
        if self.host_cache_bytes > 0:
            raise LayoutError(
                "kv_cache_config.host_cache_size (or disk_cache_size) is above 0: block ids then do not index"
                " the GPU pool; set it to 0, kvtier is the host tier"
            )


def torch_name(name: str) -> str:
    """Return torch's name of a dtype that is written as TensorRT-LLM or as torch writes it."""
    short = name.lower().removeprefix("torch.").removeprefix("datatype.")
    return _DTYPES.get(short, short)


def _kv_dtype(llm_args: object, model: Mapping[str, Any]) -> str | None:
    asked = as_text(dig(llm_args, "kv_cache_config", "dtype"))
    if asked and asked.lower() != "auto":
        return torch_name(asked)
    stored = model.get("quantization")
    stored = stored.get("quantization") if isinstance(stored, dict) else None
    stored = stored.get("kv_cache_quant_algo") if isinstance(stored, dict) else None
    algorithm = as_text(dig(llm_args, "quant_config", "kv_cache_quant_algo")) or as_text(stored)
    return torch_name(algorithm) if algorithm else None


def _numerics(llm_args: object, config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect arguments that change what a block's bytes are: values, or their order inside a row."""
    rope = str([config.get("rope_scaling"), config.get("rope_parameters"), dig(llm_args, "model_kwargs")])
    by_length = any(f"'{kind}'" in rope for kind in ("longrope", "su", "dynamic"))
    given = {
        "dtype": as_text(dig(llm_args, "dtype")),
        "attention_backend": as_text(dig(llm_args, "attn_backend")),
        "quantization": as_text(dig(llm_args, "quant_config", "quant_algo")),
        "quantization_details": _quantization_details(llm_args),
        "model_kwargs": as_plain(dig(llm_args, "model_kwargs")),
        "window": _window(llm_args),
        # Some kinds of RoPE choose their factors by it.
        "max_seq_len": as_int(dig(llm_args, "max_seq_len")) if by_length else None,
        "sparse_attention": as_text(dig(llm_args, "sparse_attention_config", "algorithm")),
    }
    return {name: value for name, value in given.items() if value is not None and value != "auto"}


def _quantization_details(llm_args: object) -> dict[str, Any] | None:
    quantization = dig(llm_args, "quant_config")
    dynamic = dig(llm_args, "force_dynamic_quantization") is True
    details: dict[str, Any] = {"dynamic": True} if dynamic else {}
    if as_text(dig(quantization, "quant_algo")) is not None:
        details.update({name: as_plain(dig(quantization, name)) for name in _QUANTIZATION})
    return {name: value for name, value in details.items() if value not in (None, False, [])} or None


def _attention_layers(config: Mapping[str, Any]) -> int | None:
    layers = as_int(config.get("num_hidden_layers"))
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind in _ATTENTION_LAYERS for kind in kinds)
    mixed = (
        "layers_block_type",
        "hybrid_override_pattern",
        "attn_layer_period",
        "block_configs",
        "mamba_d_state",
    )
    return None if any(key in config for key in mixed) else layers


def _window(llm_args: object) -> int | None:
    """Return the shortest window of the KV cache, unless no sequence can be longer."""
    windows = [
        as_int(window) for window in as_list(dig(llm_args, "kv_cache_config", "max_attention_window")) or ()
    ]
    shortest = min((window for window in windows if window is not None), default=None)
    longest = as_int(dig(llm_args, "max_seq_len"))
    return None if shortest is None or (longest is not None and longest <= shortest) else shortest


def _head_elements(config: Mapping[str, Any], llm_args: object) -> int | None:
    kv_heads = as_int(config.get("num_key_value_heads")) or as_int(config.get("num_attention_heads"))
    size = _head_dim(config)
    ranks = as_int(dig(llm_args, "tensor_parallel_size"))
    if not size or not kv_heads or not ranks or dig(llm_args, "enable_attention_dp") is True:
        return None
    return -(-kv_heads // ranks) * size


def _head_dim(config: Mapping[str, Any]) -> int | None:
    size, hidden = as_int(config.get("head_dim")), as_int(config.get("hidden_size"))
    heads = as_int(config.get("num_attention_heads"))
    return hidden // heads if size is None and hidden and heads else size


def _latent_elements(config: Mapping[str, Any]) -> int | None:
    latent, rope = as_int(config.get("kv_lora_rank")), as_int(config.get("qk_rope_head_dim"))
    return latent + rope if latent and rope else None
