"""A Llama-architecture model in plain torch whose results do not depend on how the work is cut.

Every operation runs on one *tile*: the `tokens_per_block` rows of one block of one request, those without a
token to compute being padding, and attention runs over the request's context up to the tile's end. So for a
given position all shapes, strides and alignments are the same in prefill, chunked prefill, a batch, after a
load, or in decoding (a tile with one real row), and with them the order of every sum. Rows of a matrix
product do not see each other, masked columns weigh exactly zero, and K and V are read back from the pool in
its precision: hence the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from kvtier.engine.config import ModelSpec
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import LayerHook, Span
from kvtier.engine.weights import load_tensors, model_dir


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The fields of `config.json` that the computation needs."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    rope_theta: float
    vocab_size: int

    @classmethod
    def read(cls, directory: Path) -> LlamaConfig:
        """Read a model directory's `config.json`."""
        facts = json.loads((directory / "config.json").read_text())
        heads = facts["num_attention_heads"]
        return cls(
            layers=facts["num_hidden_layers"],
            hidden=facts["hidden_size"],
            heads=heads,
            kv_heads=facts.get("num_key_value_heads", heads),
            head_dim=facts.get("head_dim") or facts["hidden_size"] // heads,
            epsilon=facts["rms_norm_eps"],
            rope_theta=facts["rope_theta"],
            vocab_size=facts["vocab_size"],
        )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer: norms `[hidden]`, and matrices `[out, in]` with q, k, v and gate, up stacked."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(slots=True)
class Tile:
    """One block of one span; rows `first` to `last` are real. `hidden` is `[tokens_per_block, hidden]`."""

    block: int
    first: int
    last: int
    hidden: torch.Tensor


class LlamaModel:
    """float32 weights and activations; K and V rounded to the pool's dtype when written.

    Attributes:
        spec: The KV shape.
        path: The model directory.
    """

    def __init__(self, directory: str | Path, device: str = "cpu") -> None:
        self.path = str(directory)
        self.config = config = LlamaConfig.read(Path(directory))
        self.spec = ModelSpec(config.layers, config.kv_heads, config.head_dim, config.vocab_size)
        self.device = torch.device(device)
        weights = load_tensors(Path(directory))
        take = {name: tensor.to(self.device) for name, tensor in weights.items()}
        self._embedding = take["model.embed_tokens.weight"]
        self._head = take.get("lm_head.weight", self._embedding)
        self._norm = take["model.norm.weight"]
        self._layers = []
        for layer in range(config.layers):
            part = {n: take[f"model.layers.{layer}.{n}.weight"] for n in _PARTS}
            self._layers.append(
                LayerWeights(
                    input_norm=part["input_layernorm"],
                    qkv=torch.cat([part[f"self_attn.{n}_proj"] for n in "qkv"]),
                    output=part["self_attn.o_proj"],
                    post_norm=part["post_attention_layernorm"],
                    gate_up=torch.cat([part["mlp.gate_proj"], part["mlp.up_proj"]]),
                    down=part["mlp.down_proj"],
                )
            )
        self._rope: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))

    def forward(
        self, spans: Sequence[Span], memory: KVMemory, before_layer: LayerHook, after_layer: LayerHook
    ) -> list[int | None]:
        """See `kvtier.engine.model.Model`; greedy."""
        logits = self.logits(spans, memory, before_layer, after_layer)
        return [None if row is None else int(row.argmax()) for row in logits]

    @torch.inference_mode()
    def logits(
        self, spans: Sequence[Span], memory: KVMemory, before_layer: LayerHook, after_layer: LayerHook
    ) -> list[torch.Tensor | None]:
        """Compute spans and return, where wanted, the logits after their last token, `[vocab_size]`."""
        size = memory.tokens_per_block
        tiled = [self._tiles(span, size) for span in spans]
        self._extend_rope(max(tiles[-1].block + 1 for tiles in tiled) * size)
        for layer, weights in enumerate(self._layers):
            before_layer(layer)
            for span, tiles in zip(spans, tiled, strict=True):
                self._layer(layer, weights, span, tiles, memory)
            after_layer(layer)
        return [
            self._head_of(tiles[-1]) if span.sample else None
            for span, tiles in zip(spans, tiled, strict=True)
        ]

    def _tiles(self, span: Span, size: int) -> list[Tile]:
        tiles = []
        for block in range(span.start // size, (span.end - 1) // size + 1):
            first = max(span.start - block * size, 0)
            last = min(span.end - block * size, size)
            tokens = torch.zeros(size, dtype=torch.long)
            tokens[first:last] = torch.tensor(span.tokens[block * size + first : block * size + last])
            tiles.append(Tile(block, first, last, self._embedding[tokens.to(self.device)]))
        return tiles

    def _layer(
        self, layer: int, weights: LayerWeights, span: Span, tiles: list[Tile], memory: KVMemory
    ) -> None:
        context = _Context(layer, span, tiles[0].block, memory)
        for tile in tiles:
            normed = self._normalize(tile.hidden, weights.input_norm)
            query, key, value = self._rotated(normed, weights, tile.block)
            context.append(tile, key, value)
            attended = self._attend(query, tile, context, memory.window_of(layer))
            tile.hidden = tile.hidden + functional.linear(attended, weights.output)
            normed = self._normalize(tile.hidden, weights.post_norm)
            gate, up = functional.linear(normed, weights.gate_up).chunk(2, dim=-1)
            tile.hidden = tile.hidden + functional.linear(functional.silu(gate) * up, weights.down)

    def _rotated(
        self, normed: torch.Tensor, weights: LayerWeights, block: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return scaled q `[heads, rows, head_dim]`, k and v `[rows, kv_heads, head_dim]` of a tile."""
        config, rows = self.config, len(normed)
        mixed = functional.linear(normed, weights.qkv).view(rows, -1, config.head_dim)
        cos, sin = (part[block * rows : (block + 1) * rows, None] for part in self._rope)
        turned = mixed[:, : config.heads + config.kv_heads]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
        query = (turned[:, : config.heads] * config.head_dim**-0.5).transpose(0, 1).contiguous()
        return query, turned[:, config.heads :], mixed[:, config.heads + config.kv_heads :]

    def _attend(self, query: torch.Tensor, tile: Tile, context: _Context, window: int | None) -> torch.Tensor:
        heads, rows, dim = query.shape
        grouped = query.view(self.config.kv_heads, -1, dim)
        keys, values = context.up_to(tile.block)
        scores = torch.bmm(grouped, keys.permute(1, 2, 0)).view(heads, rows, -1)
        # Row i sees its own block up to column i; a window hides what lies too far back.
        own = torch.arange(rows, device=self.device)
        scores[..., -rows:].masked_fill_(own > own[:, None], float("-inf"))
        if window is not None:
            columns = torch.arange(len(keys), device=self.device)
            scores.masked_fill_(columns <= own[:, None] + len(keys) - rows - window, float("-inf"))
        weighted = torch.bmm(scores.softmax(dim=-1).view(len(grouped), -1, len(keys)), values.transpose(0, 1))
        return weighted.view(heads, rows, dim).transpose(0, 1).reshape(rows, -1)

    def _normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, (self.config.hidden,), weight, self.config.epsilon)

    def _head_of(self, tile: Tile) -> torch.Tensor:
        # A copy, so that the row lies alike in memory wherever it stood in its tile.
        row = self._normalize(tile.hidden, self._norm)[tile.last - 1 : tile.last].clone()
        return functional.linear(row, self._head)[0]

    def _extend_rope(self, positions: int) -> None:
        if len(self._rope[0]) >= positions:
            return
        dim = self.config.head_dim
        frequency = self.config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.outer(torch.arange(max(positions, 4096), dtype=torch.float32), frequency)
        angles = torch.cat((angles, angles), dim=-1).to(self.device)
        self._rope = (angles.cos(), angles.sin())


class _Context:
    """One layer's K and V of one request as the pool holds them, float32 `[tokens, kv_heads, head_dim]`."""

    def __init__(self, layer: int, span: Span, first_block: int, memory: KVMemory) -> None:
        self._size = size = memory.tokens_per_block
        self._rows = (memory.keys[layer], memory.values[layer])
        self._pages = span.pages[memory.group_of[layer]]
        shape = (len(self._pages) * size, memory.spec.kv_heads, memory.spec.head_dim)
        self._buffers = tuple(torch.zeros(shape, device=memory.device) for _ in range(2))
        held = [(block, page) for block, page in enumerate(self._pages[:first_block]) if page >= 0]
        if held:
            self._read(*zip(*held, strict=True))

    def append(self, tile: Tile, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a tile's real rows into the pool and read its block back, up to the last real row."""
        page, start = self._pages[tile.block], tile.block * self._size
        for rows, new, buffer in zip(self._rows, (key, value), self._buffers, strict=True):
            kept = new[tile.first : tile.last].to(rows.dtype).transpose(0, 1)
            rows[page, :, tile.first : tile.last] = kept
            buffer[start : start + tile.last] = rows[page, :, : tile.last].transpose(0, 1)

    def up_to(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of everything up to the end of a block; rows that nothing was written to are 0."""
        end = (block + 1) * self._size
        return self._buffers[0][:end], self._buffers[1][:end]

    def _read(self, blocks: tuple[int, ...], pages: tuple[int, ...]) -> None:
        for rows, buffer in zip(self._rows, self._buffers, strict=True):
            tokens = buffer.view(-1, self._size, *buffer.shape[1:])
            tokens[list(blocks)] = rows[list(pages)].transpose(1, 2).to(buffer.dtype)


_PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def load_model(directory: str | Path | None = None, device: str = "cpu") -> LlamaModel:
    """Load a model directory; None: the one made from the packaged SmolLM2-135M."""
    return LlamaModel(directory if directory is not None else model_dir(), device)
