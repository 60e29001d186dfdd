"""A model without weights: its KV is a hash of the prefix, its next token a hash of the KV it reads back."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from kvtier.engine.config import ModelSpec, Request
from kvtier.engine.group import Group, kv_heads_of
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import LayerHook, Span

_STEP = np.uint64(0x9E3779B97F4A7C15)
_RATIO = 0xD1342543DE82EF95
_INVERSE = pow(_RATIO, -1, 1 << 64)

Words = np.ndarray[Any, np.dtype[np.uint64]]


class HashModel:
    """Milliseconds instead of seconds, and merciless: one wrong byte of KV in the pool changes the output.

    The KV of a position is a pure function of the tokens up to it, the LoRA id, the multimodal items, and the
    cache salt (a real model's KV does not depend on the salt; here it does, so that sharing across salts
    shows). The bytes take every value, NaNs included, or with `finite` look like small normal floats.

    Of several ranks each has its heads' part of these bytes, and the next token is a hash of what all ranks
    read back: it differs between numbers of ranks.
    """

    def __init__(
        self,
        layers: int = 4,
        kv_heads: int = 2,
        head_dim: int = 8,
        vocab_size: int = 50000,
        *,
        finite: bool = False,
        directory: str | Path | None = None,
    ) -> None:
        """Create the model; with `directory`, also write a `config.json` and a weights file there."""
        self.spec = ModelSpec(layers, kv_heads, head_dim, vocab_size)
        self._kv_heads = kv_heads
        self._held: Sequence[int] | None = None
        self._group: Group | None = None
        self.finite = finite
        self.path = str(directory) if directory is not None else "hash-model"
        if directory is not None:
            _write_model_directory(Path(directory), self.spec)

    def forward(
        self, spans: Sequence[Span], memory: KVMemory, before_layer: LayerHook, after_layer: LayerHook
    ) -> list[int | None]:
        """See `kvtier.engine.model.Model`."""
        states = [_prefix_states(span.tokens[: span.end], span.request)[span.start :] for span in spans]
        readers = [xxhash.xxh3_64() if span.sample else None for span in spans]
        for layer in range(self.spec.layers):
            before_layer(layer)
            for span, state, reader in zip(spans, states, readers, strict=True):
                for kind, rows in enumerate((memory.keys[layer], memory.values[layer])):
                    self._write(rows, memory, layer, kind, span, state)
                    if reader is not None:
                        reader.update(_read(rows, memory, layer, span))
            after_layer(layer)
        digests = [0 if reader is None else reader.intdigest() for reader in readers]
        if self._group is not None:
            parts = self._group.all_gather(struct.pack(f"<{len(digests)}Q", *digests))
            by_rank = [struct.unpack(f"<{len(digests)}Q", part) for part in parts]
            by_span = zip(*by_rank, strict=True)
            digests = [xxhash.xxh3_64_intdigest(struct.pack(f"<{len(parts)}Q", *read)) for read in by_span]
        return [
            digest % self.spec.vocab_size if span.sample else None
            for span, digest in zip(spans, digests, strict=True)
        ]

    def shard(self, group: Group) -> HashModel:
        """See `kvtier.engine.model.Model`."""
        part = copy.copy(self)
        part._group = group
        part._held = kv_heads_of(group.rank, group.ranks, self._kv_heads)
        part.spec = replace(self.spec, kv_heads=len(part._held))
        return part

    def kv_row(self, state: Words, layer: int, kind: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the K (kind 0) or V (1) of positions, `[len(state), kv_heads, head_dim]` of `dtype`."""
        heads, dim = self._kv_heads, self.spec.head_dim
        words = -(-heads * dim * dtype.itemsize // 8)
        tags = np.arange(words, dtype=np.uint64) + np.uint64((2 * layer + kind) * words + 1)
        mixed = _mix(state[:, None] + tags[None, :] * _STEP)
        raw = mixed.view(np.uint8).reshape(len(state), -1)[:, : heads * dim * dtype.itemsize]
        if self.finite:
            values = (raw[:, :: dtype.itemsize].astype(np.float32) - 127.5) / 64
            rows = torch.from_numpy(values).to(dtype).view(-1, heads, dim)
        else:
            rows = torch.from_numpy(np.ascontiguousarray(raw)).view(dtype).view(-1, heads, dim)
        return rows if self._held is None else rows.view(torch.uint8)[:, self._held].view(dtype)

    def _write(
        self, rows: torch.Tensor, memory: KVMemory, layer: int, kind: int, span: Span, state: Words
    ) -> None:
        if not len(state):
            return
        positions = torch.arange(span.start, span.end)
        pages = torch.tensor(span.pages[memory.group_of[layer]])[positions // memory.tokens_per_block]
        value = self.kv_row(state, layer, kind, memory.dtype).to(memory.device)
        rows.view(torch.uint8)[pages, :, positions % memory.tokens_per_block] = value.view(torch.uint8)


def _read(rows: torch.Tensor, memory: KVMemory, layer: int, span: Span) -> bytes:
    window = memory.window_of(layer)
    first = 0 if window is None else max(0, span.end - window)
    positions = torch.arange(first, span.end)
    pages = torch.tensor(span.pages[memory.group_of[layer]])[positions // memory.tokens_per_block]
    assert int(pages.min()) >= 0, "a page inside the window is gone"
    read = rows.view(torch.uint8)[pages, :, positions % memory.tokens_per_block]
    return bytes(read.cpu().numpy().tobytes())


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def _prefix_states(tokens: Sequence[int], request: Request) -> Words:
    """Return for each position a 64-bit hash of everything up to it: a polynomial in mixed tokens."""
    mixed = _mix(np.asarray(tokens, dtype=np.uint64) * _STEP + np.uint64(1))
    for item in request.multimodal:
        digest = xxhash.xxh3_64_intdigest(repr(list(item.hash)).encode())
        mixed[item.position : item.position + item.length] ^= np.uint64(digest)
    root = xxhash.xxh3_64_intdigest(repr((request.cache_salt, request.lora_id)).encode())
    powers = _powers(_RATIO, len(tokens) + 1)
    terms = np.concatenate([np.array([root], dtype=np.uint64), mixed]) * _powers(_INVERSE, len(tokens) + 1)
    sums: Words = np.cumsum(terms, dtype=np.uint64)
    return _mix((sums * powers)[1:])


def _powers(base: int, count: int) -> Words:
    factors = np.full(count, base, dtype=np.uint64)
    factors[0] = 1
    powers: Words = np.cumprod(factors, dtype=np.uint64)
    return powers


def _write_model_directory(directory: Path, spec: ModelSpec) -> None:
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["HashModel"],
        "model_type": "hash",
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.kv_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_size": spec.kv_heads * spec.head_dim,
        "vocab_size": spec.vocab_size,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({"model.weight": torch.zeros(1)}, directory / "model.safetensors")
