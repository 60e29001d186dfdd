"""What the engine's configuration says about its KV cache, and the namespace that follows from it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from kvtier.config import Config
from kvtier.connector.weights import VOLATILE_KEYS, model_facts
from kvtier.errors import ConfigError, LayoutError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout

CANONICAL = "head, token, dim"
"""The order of a row in blocks that every engine can read."""

_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_PLAIN_QUANTIZATIONS = ("NONE", "FP8_PER_TENSOR")
_STATELESS_DRAFTS = ("ngram", "ngram_gpu", "suffix")


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The engine's KV cache as its configuration describes it; the same for the scheduler and all workers.

    Attributes:
        layout: Geometry of a block, all shards.
        namespace: What its blocks are blocks of.
        layers: Names of the layers that have a KV cache, in the order of a block's rows.
        heads: K and V heads of one rank.
        head_size: Elements of a head; of a token for MLA.
        latent: Whether a row is MLA's latent, without heads and equal on all ranks.
        rows: Order of the elements of a row: "head, token, dim", or one that only a like engine reads.
        on_cpu: Whether vLLM's CPU kernels compute, which have an order of their own.
        rank: This process's rank.
        ranks: How many workers the engine has.
        session: A number that all processes of the engine share, and no other engine.
    """

    layout: BlockLayout
    namespace: Namespace
    layers: tuple[str, ...]
    heads: int
    head_size: int
    latent: bool
    rows: str
    on_cpu: bool
    rank: int
    ranks: int
    session: int

    @classmethod
    def read(cls, vllm_config: Any, kv_cache_config: Any, config: Config) -> EngineFacts:
        """Read the engine's configuration.

        Raises:
            LayoutError: A KV cache that kvtier does not support; the message says why.
            ConfigError: kvtier's configuration does not fit the engine.
        """
        parallel = vllm_config.parallel_config
        ranks = int(parallel.tensor_parallel_size)
        _check_engine(vllm_config, ranks, config)
        spec, layers = _only_group(kv_cache_config)
        kinds = {base.__name__ for base in type(spec).__mro__}
        latent = "MLAAttentionSpec" in kinds
        dtype, row, heads, head_size = _row(spec, str(vllm_config.cache_config.cache_dtype), latent)
        layout = BlockLayout(
            dtype,
            int(spec.block_size),
            len(layers),
            1 if latent else 2,
            row,
            shards=1 if latent else ranks,
            head_dim=head_size,
        )
        on_cpu = _on_cpu()
        if latent and on_cpu and not vllm_config.scheduler_config.enable_chunked_prefill:
            raise LayoutError(
                "MLA on this CPU is not supported: vLLM has no prefix cache of its own there, since prompts"
                " that begin in the middle come out otherwise"
            )
        rows = "token, dim" if latent else _row_order(vllm_config, spec) if on_cpu else CANONICAL
        session = hashlib.blake2b(str(vllm_config.kv_transfer_config.engine_id).encode(), digest_size=7)
        return cls(
            layout,
            _namespace(vllm_config, layout, ranks, rows),
            layers,
            heads,
            head_size,
            latent,
            rows,
            on_cpu,
            int(parallel.rank),
            ranks,
            int.from_bytes(session.digest(), "little"),
        )


def config_path(vllm_config: Any) -> str | None:
    """Return the file that `kv_connector_extra_config` names; None leaves it to KVTIER_CONFIG.

    Raises:
        ConfigError: It contains something else.
    """
    extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
    path = extra.pop("config", None)
    if extra or not isinstance(path, (str, type(None))):
        raise ConfigError(
            f"kv_connector_extra_config: {sorted(extra) or 'config'} is not understood; allowed: config, the"
            " path of kvtier's YAML file"
        )
    return path


def _check_engine(vllm_config: Any, ranks: int, config: Config) -> None:
    parallel = vllm_config.parallel_config
    if int(parallel.world_size) != ranks:
        raise LayoutError(
            f"the engine has {parallel.world_size} workers for tensor_parallel_size {ranks}: pipeline and"
            " context parallelism are not supported"
        )
    if int(getattr(parallel, "decode_context_parallel_size", 1)) != 1:
        raise LayoutError("decode_context_parallel_size above 1 is not supported: ranks hold other tokens")
    if ranks > 1 and config.agent.mode == "inprocess":
        raise ConfigError(
            f"agent.mode: inprocess serves an engine of one rank, this one has {ranks}; allowed: auto,"
            " external"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and str(speculative.method) not in _STATELESS_DRAFTS:
        raise LayoutError(
            f"speculative decoding by {speculative.method} is not supported: a draft model's KV depends on"
            f" the token after the block; allowed: {', '.join(_STATELESS_DRAFTS)}"
        )
    if getattr(vllm_config.model_config, "is_diffusion", False):
        raise LayoutError("diffusion models are not supported: a token's KV depends on those after it")
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise LayoutError(
            "calculate_kv_scales takes the KV cache's scales from the first batch, so its blocks mean nothing"
            " to another engine; use a checkpoint with scales"
        )


def _only_group(kv_cache_config: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the one kind of layer cache that there is, and its layers in order."""
    groups = kv_cache_config.kv_cache_groups
    names = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1 or names[0] not in ("FullAttentionSpec", "MLAAttentionSpec"):
        raise LayoutError(
            f"a KV cache of {len(groups)} groups of {', '.join(names) or 'no kind'} is not supported: kvtier"
            " needs one group of layers that all keep K and V (or MLA's latent) of every token. Windows in"
            " some of the layers are fine with --disable-hybrid-kv-cache-manager, windows in all of them with"
            " --disable-sliding-window; state-space layers are not"
        )
    (group,) = groups
    return group.kv_cache_spec, tuple(sorted(group.layer_names, key=_natural))


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _row(spec: Any, cache_dtype: str, latent: bool) -> tuple[str, int, int, int]:
    """Return the element type, the elements of a row, the heads and the elements of a head."""
    mode = getattr(spec.kv_quant_mode, "name", str(spec.kv_quant_mode))
    ratio = getattr(spec, "tokens_per_state", getattr(spec, "compress_ratio", 1))
    if mode not in _PLAIN_QUANTIZATIONS or ratio not in (None, 1):
        raise LayoutError(
            f"a KV cache of dtype {cache_dtype} is not supported: its rows hold more than the elements of"
            " tokens"
        )
    name = str(spec.dtype).removeprefix("torch.")
    if latent:
        size = int(spec.real_page_size_bytes)
        packed = cache_dtype == "fp8_ds_mla" or size != spec.block_size * spec.head_size * spec.dtype.itemsize
        itemsize = 1 if packed else int(spec.dtype.itemsize)
        name = "uint8" if packed else _FP8.get(cache_dtype, name)
        return name, size // itemsize, 1, size // itemsize // int(spec.block_size)
    if (spec.head_size_v or spec.head_size) != spec.head_size:
        raise LayoutError(
            f"heads of {spec.head_size} elements in K and {spec.head_size_v} in V are not supported"
        )
    row = int(spec.num_kv_heads) * int(spec.block_size) * int(spec.head_size)
    if int(spec.real_page_size_bytes) != 2 * row * spec.dtype.itemsize:
        raise LayoutError(
            f"a page of {spec.real_page_size_bytes} bytes is not supported: K and V have {row} elements each"
        )
    return _FP8.get(cache_dtype, name), row, int(spec.num_kv_heads), int(spec.head_size)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _row_order(vllm_config: Any, spec: Any) -> str:
    """Say how a row is arranged in blocks of the CPU's kernels: as everywhere, unless only they know how."""
    import vllm
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    kernel = _get_attn_isa(model.dtype, spec.block_size, spec.head_size, cache.cache_dtype)
    if kernel in ("vec", "vec16"):
        return CANONICAL
    return f"vllm {vllm.__version__} cpu {kernel}"


def _namespace(vllm_config: Any, layout: BlockLayout, ranks: int, rows: str) -> Namespace:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    numerics = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "kv_cache_dtype": str(cache.cache_dtype),
        "quantization": None if model.quantization is None else str(model.quantization),
        "model_config": _digest(_effective_config(model)),
    }
    online = getattr(model, "quantization_config", None)
    if online is not None:
        # How vLLM itself quantizes the weights, and which of them it leaves alone.
        numerics["quantization_config"] = _digest(repr(online))
    load_format = vllm_config.load_config.load_format
    if str(getattr(load_format, "value", load_format)) == "dummy":
        numerics["load_format"] = "dummy"
    identity = model_facts(str(getattr(model, "model_weights", "") or model.model), model.revision)
    if "private" in identity:
        # Private to the engine: its processes hold parts of the same.
        identity["private"] = str(vllm_config.kv_transfer_config.engine_id)
    return Namespace.from_facts(
        {
            "engine": "vllm",
            "model": identity,
            "numerics": numerics,
            "tensor_parallel_size": ranks,
            "layout": layout.describe(),
            "rows": rows,
        }
    )


def _effective_config(model: Any) -> dict[str, Any]:
    """Return the model's configuration with all overrides: rope scaling, for one, changes every K."""
    facts = {k: v for k, v in model.hf_text_config.to_dict().items() if k not in VOLATILE_KEYS}
    rope = json.dumps([facts.get("rope_scaling"), facts.get("rope_parameters")], default=str)
    if "longrope" in rope or '"su"' in rope:
        # Which of its two sets of factors is used depends on this.
        facts["max_model_len"] = int(model.max_model_len)
    return facts


def _digest(facts: object) -> str:
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
