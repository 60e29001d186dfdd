"""A Llama model over tensor-parallel ranks.

A rank has the KV heads that `kv_heads_of` gives it, with their query heads, and a run of the columns of the
MLP. What it computes of these is gathered, and the products that sum over heads or columns are computed whole
on every rank. So no sum is cut, and the results do not depend on how ranks would add up their shares.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from kvtier.engine.config import ModelSpec
from kvtier.engine.group import Group, first_copies, kv_heads_of
from kvtier.engine.llama import LayerWeights, LlamaModel, Tile


class LlamaShard(LlamaModel):
    """One rank's part. It shares the whole model's threads and the weights that are not split."""

    def __init__(self, whole: LlamaModel, group: Group) -> None:
        self.__dict__.update(copy.copy(whole.__dict__))
        self._group = group
        self._all_heads = whole.config
        self._copies = first_copies(group.ranks, whole.config.kv_heads)
        held = kv_heads_of(group.rank, group.ranks, whole.config.kv_heads)
        queries = whole.config.heads // whole.config.kv_heads
        self.config = replace(whole.config, heads=len(held) * queries, kv_heads=len(held))
        self.spec = ModelSpec(self.config.layers, len(held), self.config.head_dim, self.config.vocab_size)
        self._layers = [self._split(weights, held) for weights in whole._layers]
        if self.device.type == "cpu":
            # What the calling thread does around a gather is small, and the threads that OpenMP would use
            # for it go on spinning on cores that the other ranks need: 2.4 times slower on two cores.
            torch.set_num_threads(1)

    def _split(self, weights: LayerWeights, held: Sequence[int]) -> LayerWeights:
        whole = self._all_heads
        rows = weights.qkv.view(whole.heads + 2 * whole.kv_heads, whole.head_dim, -1)
        queries = whole.heads // whole.kv_heads
        chosen = [head * queries + query for head in held for query in range(queries)]
        chosen += [whole.heads + head for head in held]
        chosen += [whole.heads + whole.kv_heads + head for head in held]
        gate, up = weights.gate_up.chunk(2)
        columns = np.array_split(np.arange(len(gate)), self._group.ranks)[self._group.rank]
        return replace(
            weights,
            qkv=rows[chosen].flatten(0, 1).contiguous(),
            gate_up=torch.cat([gate[columns], up[columns]]),
        )

    def _finish_layer(
        self, attend: Callable[[Tile], torch.Tensor], weights: LayerWeights, tiles: Sequence[Tile]
    ) -> None:
        whole = self._all_heads
        width = whole.heads // whole.kv_heads * whole.head_dim
        gathered = self._gather(self._each(attend, tiles))
        side_by_side = torch.cat(gathered, dim=-1)
        by_head = side_by_side.view(*side_by_side.shape[:2], -1, width)
        heads = by_head[..., self._copies, :].flatten(-2)
        activated = self._each(
            lambda pair: self._expand(weights, *pair), list(zip(tiles, heads, strict=True))
        )
        columns = torch.cat(self._gather(activated), dim=-1)
        self._each(lambda pair: self._contract(weights, *pair), list(zip(tiles, columns, strict=True)))

    def _predict(self, tile: Tile | None) -> torch.Tensor | None:
        return super()._predict(tile) if self._group.rank == 0 else None

    def _gather(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return, for each rank, its parts of all tiles, `[tiles, rows, width]`."""
        own = torch.stack(list(parts)).cpu()
        received = self._group.all_gather(own.numpy().tobytes())
        shape = (*own.shape[:2], -1)
        return [
            torch.frombuffer(bytearray(data), dtype=own.dtype).view(shape).to(self.device)
            for data in received
        ]
