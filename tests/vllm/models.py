"""Small models with random weights, of the shapes that the tests' real one does not have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

COMMON = {
    "vocab_size": 49_152,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    # Large enough for the attention to matter to what is said.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def model(place: Path, kind: str = "Llama", **changes: Any) -> str:
    """Make a model of one of transformers' kinds; returns its folder."""
    import transformers

    folder = place / f"{kind}-{hashlib.blake2b(repr(changes).encode(), digest_size=4).hexdigest()}"
    if not folder.exists():
        config = getattr(transformers, f"{kind}Config")(**{**COMMON, **changes})
        torch.manual_seed(1)
        getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return str(folder)


def adapter(place: Path, base: str, seed: int) -> str:
    """Make a LoRA adapter for the attention of a model; returns its folder."""
    folder = place / f"adapter-{seed}"
    folder.mkdir()
    config = json.loads((Path(base) / "config.json").read_text())
    sizes = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    generator, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in sizes.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            weights[f"{stem}A.weight"] = torch.randn(8, config["hidden_size"], generator=generator)
            weights[f"{stem}B.weight"] = torch.randn(heads * config["head_dim"], 8, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none", "target_modules": list(sizes)}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    return str(folder)
