"""A Llama-architecture model in plain torch whose results do not depend on how the work is cut.

Every operation runs on one *tile*: the `tokens_per_block` rows of one block of one request, those without a
token to compute being padding, and attention runs over the request's context up to the tile's end. So for a
given position all shapes, strides and alignments are the same in prefill, chunked prefill, a batch, after a
load, or in decoding (a tile with one real row), and with them the order of every sum. Rows of a matrix
product do not see each other, masked columns weigh exactly zero, and K and V are read back from the pool in
its precision: hence the same bits. Tiles are spread over threads, each operation running on one, so their
number does not matter either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional

from kvtier.engine.config import ModelSpec
from kvtier.engine.group import Group
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import LayerHook, Span
from kvtier.engine.weights import load_tensors, model_dir

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    """One block of one span.

    Attributes:
        span: Whose block.
        block: Which.
        first: Its first real row.
        last: The row after the last real one.
        hidden: Activations, `[tokens_per_block, hidden]`.
        query: Scaled and rotated queries of the current layer, `[heads, tokens_per_block, head_dim]`.
    """

    span: Span
    block: int
    first: int
    last: int
    hidden: torch.Tensor
    query: torch.Tensor = field(default_factory=lambda: torch.empty(0))


class LlamaModel:
    """float32 weights and activations; K and V rounded to the pool's dtype when written.

    Attributes:
        spec: The KV shape.
        path: The model directory.
    """

    def __init__(self, directory: str | Path, device: str = "cpu", threads: int | None = None) -> None:
        """Map the weights of a model directory.

        Args:
            directory: See `kvtier.engine.weights.model_dir`.
            device: Where to compute.
            threads: Threads that compute on a CPU; None: one for each core that this process may use.
        """
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
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        if self.device.type == "cpu":
            count = threads or len(os.sched_getaffinity(0))
            self._pool = ThreadPoolExecutor(count, "llama", initializer=partial(torch.set_num_threads, 1))

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
        tiled = self._each(partial(self._tiles, memory.tokens_per_block), spans)
        tiles = [tile for part in tiled for tile in part]
        self._extend_rope(max(tile.block + 1 for tile in tiles) * memory.tokens_per_block)
        for layer, weights in enumerate(self._layers):
            before_layer(layer)
            self._each(partial(self._project, layer, weights, memory), tiles)
            read = self._each(partial(_read_context, layer, memory), spans)
            contexts = {id(span): context for span, context in zip(spans, read, strict=True)}
            self._finish_layer(partial(self._attend, memory.window_of(layer), contexts), weights, tiles)
            after_layer(layer)
        last = [part[-1] if part[-1].span.sample else None for part in tiled]
        return self._each(self._predict, last)

    def shard(self, group: Group) -> LlamaModel:
        """See `kvtier.engine.model.Model`."""
        from kvtier.engine.llama_shard import LlamaShard

        return LlamaShard(self, group)

    def __reduce__(self) -> tuple[type[LlamaModel], tuple[str, str, int | None]]:
        """Other processes map the weights themselves."""
        return LlamaModel, (self.path, str(self.device), self._threads)

    def _finish_layer(
        self, attend: Callable[[Tile], torch.Tensor], weights: LayerWeights, tiles: Sequence[Tile]
    ) -> None:
        """Attend, and compute the rest of a layer, tile by tile."""

        def finish(tile: Tile) -> None:
            self._contract(weights, tile, self._expand(weights, tile, attend(tile)))

        self._each(finish, tiles)

    def _each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        if self._pool is None:
            return [function(item) for item in items]
        return list(self._pool.map(function, items))

    @torch.inference_mode()
    def _tiles(self, size: int, span: Span) -> list[Tile]:
        tiles = []
        for block in range(span.start // size, (span.end - 1) // size + 1):
            first = max(span.start - block * size, 0)
            last = min(span.end - block * size, size)
            tokens = torch.zeros(size, dtype=torch.long)
            tokens[first:last] = torch.tensor(span.tokens[block * size + first : block * size + last])
            tiles.append(Tile(span, block, first, last, self._embedding[tokens.to(self.device)]))
        return tiles

    @torch.inference_mode()
    def _project(self, layer: int, weights: LayerWeights, memory: KVMemory, tile: Tile) -> None:
        """Compute a tile's q, k and v, and write its real rows of k and v into the pool."""
        config, rows = self.config, len(tile.hidden)
        normed = self._normalize(tile.hidden, weights.input_norm)
        mixed = functional.linear(normed, weights.qkv).view(rows, -1, config.head_dim)
        cos, sin = (part[tile.block * rows : (tile.block + 1) * rows, None] for part in self._rope)
        turned = mixed[:, : config.heads + config.kv_heads]
        low, high = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
        tile.query = (turned[:, : config.heads] * config.head_dim**-0.5).transpose(0, 1).contiguous()
        page = tile.span.pages[memory.group_of[layer]][tile.block]
        real = slice(tile.first, tile.last)
        key, value = turned[real, config.heads :], mixed[real, config.heads + config.kv_heads :]
        memory.keys[layer][page, :, real] = key.to(memory.dtype).transpose(0, 1)
        memory.values[layer][page, :, real] = value.to(memory.dtype).transpose(0, 1)

    @torch.inference_mode()
    def _attend(
        self, window: int | None, contexts: dict[int, tuple[torch.Tensor, torch.Tensor]], tile: Tile
    ) -> torch.Tensor:
        """Return what a tile's heads see of everything up to its end, `[rows, heads * head_dim]`."""
        heads, rows, dim = tile.query.shape
        keys, values = (part[: (tile.block + 1) * rows] for part in contexts[id(tile.span)])
        grouped = tile.query.view(self.config.kv_heads, -1, dim)
        scores = torch.bmm(grouped, keys.permute(1, 2, 0)).view(heads, rows, -1)
        # Row i sees its own block up to column i; a window hides what lies too far back.
        own = torch.arange(rows, device=self.device)
        scores[..., -rows:].masked_fill_(own > own[:, None], float("-inf"))
        if window is not None:
            columns = torch.arange(len(keys), device=self.device)
            scores.masked_fill_(columns <= own[:, None] + len(keys) - rows - window, float("-inf"))
        shares = scores.softmax(dim=-1).view(len(grouped), -1, len(keys))
        mixed = torch.bmm(shares, values.transpose(0, 1)).view(heads, rows, dim)
        return mixed.transpose(0, 1).reshape(rows, -1)

    @torch.inference_mode()
    def _expand(self, weights: LayerWeights, tile: Tile, attended: torch.Tensor) -> torch.Tensor:
        """Add the attention of all heads to a tile; return its gated activations."""
        tile.hidden = tile.hidden + functional.linear(attended, weights.output)
        normed = self._normalize(tile.hidden, weights.post_norm)
        gate, up = functional.linear(normed, weights.gate_up).chunk(2, dim=-1)
        return functional.silu(gate) * up

    @torch.inference_mode()
    def _contract(self, weights: LayerWeights, tile: Tile, activated: torch.Tensor) -> None:
        """Add what follows from all gated activations to a tile."""
        tile.hidden = tile.hidden + functional.linear(activated, weights.down)

    @torch.inference_mode()
    def _predict(self, tile: Tile | None) -> torch.Tensor | None:
        if tile is None:
            return None
        # A copy, so that the row lies alike in memory wherever it stood in its tile.
        row = self._normalize(tile.hidden, self._norm)[tile.last - 1 : tile.last].clone()
        return functional.linear(row, self._head)[0]

    def _normalize(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, (self.config.hidden,), weight, self.config.epsilon)

    def _extend_rope(self, positions: int) -> None:
        if len(self._rope[0]) >= positions:
            return
        dim = self.config.head_dim
        frequency = self.config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles = torch.outer(torch.arange(max(positions, 4096), dtype=torch.float32), frequency)
        angles = torch.cat((angles, angles), dim=-1).to(self.device)
        self._rope = (angles.cos(), angles.sin())


@torch.inference_mode()
def _read_context(layer: int, memory: KVMemory, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
    """Read one layer's K and V of a span's whole context from the pool.

    Returns:
        Two float32 tensors `[blocks * tokens_per_block, kv_heads, head_dim]`; rows from `span.end` on, and
        those of blocks without a page, are zero, whatever the pool holds there.
    """
    blocks = -(-span.end // memory.tokens_per_block)
    listed = span.pages[memory.group_of[layer]][:blocks]
    pages = torch.tensor(listed, device=memory.device)
    shape = (blocks, memory.tokens_per_block, memory.spec.kv_heads, memory.spec.head_dim)
    both = []
    for rows in (memory.keys[layer], memory.values[layer]):
        context = torch.empty(shape, device=memory.device)
        context.copy_(rows[pages.clamp(min=0)].transpose(1, 2))
        context[pages < 0] = 0
        context.flatten(0, 1)[span.end :] = 0
        both.append(context.flatten(0, 1))
    return both[0], both[1]


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


def load_model(
    directory: str | Path | None = None, device: str = "cpu", threads: int | None = None
) -> LlamaModel:
    """Load a model directory; None: the one made from the packaged SmolLM2-135M."""
    return LlamaModel(directory if directory is not None else model_dir(), device, threads)
