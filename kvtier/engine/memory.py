"""The KV pool's memory: one tensor, or pools by layer group, and the views that the model computes on."""

from __future__ import annotations

import torch

from kvtier.engine.config import EngineConfig, ModelSpec
from kvtier.engine.layout import BufferRef, KvCacheLayout, LayerGroupLayout, Region

SLOT_PADDING = 64
"""Bytes between and after the ranges of a slot where there are several groups: stride and size differ."""

EMPTY = 0xFF
"""Initial content of the pool: NaN in every float format."""


class KVMemory:
    """Pages of K and V rows.

    Attributes:
        keys: For each layer a view `[pages, kv_heads, tokens_per_block, head_dim]` of `dtype`.
        values: The same for V.
        tensor: The flat pool `[num_blocks, layers, 2, kv_heads * tokens_per_block * head_dim]`, or None.
        layout: The description by layer group, or None.
        groups: Layer indices of each page-index space; a flat pool has one.
        windows: Attention window of each group in tokens, None for full attention.
        num_pages: Pages of each group; they differ, so that an index of one group is not one of another.
    """

    def __init__(self, spec: ModelSpec, config: EngineConfig) -> None:
        self.spec = spec
        self.tokens_per_block = config.tokens_per_block
        self.dtype: torch.dtype = getattr(torch, config.kv_dtype)
        self.device = torch.device(config.device)
        self.tensor: torch.Tensor | None = None
        self.layout: KvCacheLayout | None = None
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.windows: list[int | None]
        if config.layout == "flat":
            self.groups = [list(range(spec.layers))]
            self.windows = [None]
            self.num_pages = [config.num_blocks]
            self._allocate_flat()
        else:
            count = min(config.num_groups, spec.layers)
            self.groups = [list(range(spec.layers))[group::count] for group in range(count)]
            self.windows = [*[None for _ in range(count - 1)], config.window]
            self.num_pages = [config.num_blocks + 3 * group for group in range(count)]
            self._allocate_groups()
        self.group_of = {layer: group for group, layers in enumerate(self.groups) for layer in layers}

    def _allocate_flat(self) -> None:
        spec, tokens = self.spec, self.tokens_per_block
        row = spec.kv_heads * tokens * spec.head_dim
        shape = (self.num_pages[0], spec.layers, 2, row)
        raw = torch.full((self.num_pages[0], spec.layers, 2, row * self.dtype.itemsize), EMPTY,
                         dtype=torch.uint8, device=self.device)  # fmt: skip
        self.tensor = raw.view(self.dtype).view(shape)
        rows = self.tensor.view(*shape[:3], spec.kv_heads, tokens, spec.head_dim)
        self.keys = [rows[:, layer, 0] for layer in range(spec.layers)]
        self.values = [rows[:, layer, 1] for layer in range(spec.layers)]

    def _allocate_groups(self) -> None:
        views: dict[tuple[int, str], torch.Tensor] = {}
        described = []
        padding = SLOT_PADDING if len(self.groups) > 1 else 0
        for group, layers in enumerate(self.groups):
            pages = self.num_pages[group]
            # Even groups keep K and V of a slot in one range, odd ones in two: both occur upstream.
            refs = [BufferRef(layer, role) for layer in layers for role in ("key", "value")]
            if group % 2:
                runs = [[ref for ref in refs if ref.role == role] for role in ("key", "value")]
            else:
                runs = [refs]
            row_bytes = self.spec.kv_heads * self.tokens_per_block * self.spec.head_dim * self.dtype.itemsize
            stride = sum(len(run) * row_bytes + padding for run in runs)
            storage = torch.full((pages * stride,), EMPTY, dtype=torch.uint8, device=self.device)
            regions = []
            offset = 0
            for run in runs:
                for place, ref in enumerate(run):
                    views[ref.layer_id, ref.role] = self._row_view(
                        storage, pages, stride, offset + place * row_bytes
                    )
                size = len(run) * row_bytes
                regions.append(Region(storage.data_ptr() + offset, size, stride, pages, tuple(run), storage))
                offset += size + padding
            described.append(LayerGroupLayout(group, tuple(layers), self.windows[group], tuple(regions)))
        self.keys = [views[layer, "key"] for layer in range(self.spec.layers)]
        self.values = [views[layer, "value"] for layer in range(self.spec.layers)]
        single = None
        if len(self.groups) == 1:
            row = self.spec.kv_heads * self.tokens_per_block * self.spec.head_dim
            single = storage.view(self.dtype).view(self.num_pages[0], self.spec.layers, 2, row)
        self.layout = KvCacheLayout(self.tokens_per_block, tuple(described), single=single)

    def _row_view(self, storage: torch.Tensor, pages: int, stride: int, offset: int) -> torch.Tensor:
        item = self.dtype.itemsize
        heads, tokens, dim = self.spec.kv_heads, self.tokens_per_block, self.spec.head_dim
        return storage.view(self.dtype).as_strided(
            (pages, heads, tokens, dim), (stride // item, tokens * dim, dim, 1), offset // item
        )

    def window_of(self, layer: int) -> int | None:
        """Return a layer's attention window in tokens, None for full attention."""
        return self.windows[self.group_of[layer]]

    def fill(self, group: int, page: int, value: int = EMPTY) -> None:
        """Overwrite every byte of one page."""
        for layer in self.groups[group]:
            self.keys[layer][page].view(torch.uint8).fill_(value)
            self.values[layer][page].view(torch.uint8).fill_(value)
