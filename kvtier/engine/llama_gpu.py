"""A Llama-architecture model as fast as torch makes it on a GPU: bfloat16, whole spans, flash attention.

Its results depend on how the work is cut, as those of the engines in production do: matrix products of other
heights round otherwise. `kvtier.engine.llama` is the one whose bits never change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from kvtier.engine.config import ModelSpec
from kvtier.engine.group import Group
from kvtier.engine.llama import LlamaConfig
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import LayerHook, Span
from kvtier.engine.weights import load_tensors

Take = Callable[[str, Sequence[int]], torch.Tensor]
"""Gives a weight by Hugging Face's name, in the shape given."""


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Part:
    """One span: its rows among those computed together, its context, and its pages by layer group."""

    rows: slice
    context: int
    pages: list[torch.Tensor]


class GpuLlama:
    """bfloat16 weights and activations on a GPU, greedy; one rank.

    Attributes:
        spec: The KV shape.
        path: The model directory, or the model's name.
    """

    def __init__(self, config: LlamaConfig, path: str, device: torch.device, intermediate: int, take: Take):
        """Take the weights; see `load` and `random`."""
        self.config, self.path, self.device = config, path, device
        self.spec = ModelSpec(config.layers, config.kv_heads, config.head_dim, config.vocab_size)
        hidden, dim = config.hidden, config.head_dim
        self._embedding = take("model.embed_tokens.weight", (config.vocab_size, hidden))
        self._head = take("lm_head.weight", (config.vocab_size, hidden))
        self._norm = take("model.norm.weight", (hidden,))
        self._layers = []
        for layer in range(config.layers):

            def part(name: str, *shape: int, layer: int = layer) -> torch.Tensor:
                return take(f"model.layers.{layer}.{name}.weight", shape)

            queries, keys = config.heads * dim, config.kv_heads * dim
            qkv = [
                part(f"self_attn.{n}_proj", rows, hidden)
                for n, rows in zip("qkv", (queries, keys, keys), strict=True)
            ]
            gate_up = [part(f"mlp.{n}_proj", intermediate, hidden) for n in ("gate", "up")]
            self._layers.append(
                _Layer(
                    input_norm=part("input_layernorm", hidden),
                    qkv=torch.cat(qkv),
                    output=part("self_attn.o_proj", hidden, queries),
                    post_norm=part("post_attention_layernorm", hidden),
                    gate_up=torch.cat(gate_up),
                    down=part("mlp.down_proj", hidden, intermediate),
                )
            )
        self._rope = (torch.empty(0), torch.empty(0))

    @classmethod
    def load(cls, directory: str | Path, device: str = "cuda") -> GpuLlama:
        """Read a model directory; see `kvtier.engine.weights.model_dir`."""
        config = LlamaConfig.read(Path(directory))
        weights = load_tensors(Path(directory))
        tied = weights["model.embed_tokens.weight"]
        intermediate = len(weights["model.layers.0.mlp.up_proj.weight"])

        def take(name: str, shape: Sequence[int]) -> torch.Tensor:
            weight = weights.get(name, tied) if name == "lm_head.weight" else weights[name]
            return weight.view(*shape).to(device, torch.bfloat16)

        return cls(config, str(directory), torch.device(device), intermediate, take)

    @classmethod
    def random(
        cls, config: LlamaConfig, intermediate: int, name: str, seed: int = 0, device: str = "cuda"
    ) -> GpuLlama:
        """Make up weights of the usual spread from a seed; what it says makes no sense.

        Args:
            config: The shape.
            intermediate: Width of the MLP.
            name: Becomes `path`.
            seed: Of all weights.
            device: Where to compute.
        """
        generator = torch.Generator(device).manual_seed(seed)

        def take(name: str, shape: Sequence[int]) -> torch.Tensor:
            if len(shape) == 1:
                return torch.ones(*shape, dtype=torch.bfloat16, device=device)
            weight = torch.empty(*shape, dtype=torch.bfloat16, device=device)
            return weight.normal_(0.0, shape[1] ** -0.5, generator=generator)

        return cls(config, name, torch.device(device), intermediate, take)

    @torch.inference_mode()
    def forward(
        self, spans: Sequence[Span], memory: KVMemory, before_layer: LayerHook, after_layer: LayerHook
    ) -> list[int | None]:
        """See `kvtier.engine.model.Model`, but for bits that depend on the cut."""
        logits = self.logits(spans, memory, before_layer, after_layer)
        # The one place where the host waits for the GPU.
        found = iter(logits.argmax(dim=-1).tolist())
        return [next(found) if span.sample else None for span in spans]

    @torch.inference_mode()
    def logits(
        self, spans: Sequence[Span], memory: KVMemory, before_layer: LayerHook, after_layer: LayerHook
    ) -> torch.Tensor:
        """Compute spans; return the logits after the last token of those that sample, `[n, vocab_size]`."""
        parts = list(self._parts(spans, memory))
        tokens = [token for span in spans for token in span.tokens[span.start : span.end]]
        positions = self._upload([p for span in spans for p in range(span.start, span.end)])
        blocks = positions // memory.tokens_per_block
        rows = positions % memory.tokens_per_block
        cos, sin = self._angles(max(span.end for span in spans), positions)
        hidden = self._embedding[self._upload(tokens)]
        width = self.config.heads + self.config.kv_heads
        written = [
            torch.cat([part.pages[group][blocks[part.rows]] for part in parts])
            for group in range(len(memory.groups))
        ]
        for layer, weights in enumerate(self._layers):
            before_layer(layer)
            mixed = functional.linear(self._normalize(hidden, weights.input_norm), weights.qkv)
            mixed = mixed.view(len(hidden), -1, self.config.head_dim)
            low, high = mixed[:, :width].chunk(2, dim=-1)
            turned = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
            group = memory.group_of[layer]
            memory.keys[layer][written[group], :, rows] = turned[:, self.config.heads :].to(memory.dtype)
            memory.values[layer][written[group], :, rows] = mixed[:, width:].to(memory.dtype)
            attended = [
                self._attend(turned[part.rows, : self.config.heads], part, layer, memory) for part in parts
            ]
            hidden = hidden + functional.linear(torch.cat(attended), weights.output)
            normed = self._normalize(hidden, weights.post_norm)
            gate, up = functional.linear(normed, weights.gate_up).chunk(2, dim=-1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, weights.down)
            after_layer(layer)
        last = [part.rows.stop - 1 for part, span in zip(parts, spans, strict=True) if span.sample]
        return functional.linear(self._normalize(hidden[self._upload(last)], self._norm), self._head)

    def shard(self, group: Group) -> GpuLlama:
        """Refuse: there is one rank.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("GpuLlama has one rank")

    def _parts(self, spans: Sequence[Span], memory: KVMemory) -> Iterator[_Part]:
        first = 0
        for span in spans:
            rows = slice(first, first + span.end - span.start)
            yield _Part(rows, span.end, [self._upload(pages) for pages in span.pages])
            first = rows.stop

    def _attend(self, query: torch.Tensor, part: _Part, layer: int, memory: KVMemory) -> torch.Tensor:
        """Return what a span's queries see of its context, `[rows, heads * head_dim]`."""
        pages = part.pages[memory.group_of[layer]]
        key, value = (
            rows[layer][pages].transpose(1, 2).flatten(0, 1)[: part.context].to(query.dtype)[None]
            for rows in (memory.keys, memory.values)
        )
        return _causal_attention(query[None], key, value)[0].reshape(len(query), -1)

    def _normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, (self.config.hidden,), weight, self.config.epsilon)

    def _upload(self, numbers: Sequence[int]) -> torch.Tensor:
        host = torch.tensor(numbers, dtype=torch.long)
        # From memory that is not pinned the host would wait for the GPU, and for what it still loads.
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _angles(self, end: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._rope[0]) < end:
            dim = self.config.head_dim
            frequency = self.config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            angles = torch.outer(torch.arange(max(end, 4096), dtype=torch.float64), frequency)
            cos, sin = (part.to(self.device, torch.bfloat16) for part in (angles.cos(), angles.sin()))
            self._rope = cos, sin
        cos, sin = self._rope
        return cos[positions, None], sin[positions, None]


def _causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return attention over `[1, tokens, heads, head_dim]` in which the last query sees every key."""
    rows, context = query.shape[1], key.shape[1]
    if query.is_cuda:
        flash = torch.ops.aten._flash_attention_forward
        attended: torch.Tensor = flash(query, key, value, None, None, rows, context, 0.0, True, False)[0]
        return attended
    mask = torch.ones(rows, context, dtype=torch.bool).tril(context - rows)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    seen = functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    return seen.transpose(1, 2)
