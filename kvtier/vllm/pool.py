"""The engine's KV pool, one tensor a layer, as blocks of the one arrangement that kvtier stores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from kvtier.errors import LayoutError
from kvtier.gpu.ranges import PageMap, Region
from kvtier.layout import ITEM_BYTES
from kvtier.vllm.identity import CANONICAL, EngineFacts

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Elements are moved as integers of their size: no bit of them is looked at."""


class LayerPool:
    """The pool as views `[blocks, ...]` whose other dimensions are in the order of a slot.

    Attributes:
        device: Where the pool lies.
        blocks: How many there are.
        block_bytes: Bytes of one, as it is stored.
        shape: Its elements, as they are stored: `[layers, (2, heads,) tokens, dim]`.
        planes: Views of the pool, each of one layer or of all.
        parts: The place of each plane's part of a block: an index into the block as it is stored.
        map: Where blocks lie, if all of each layer's lies together as it is stored; else None.
    """

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], blocks: int, engine: EngineFacts) -> None:
        """Take the engine's tensors, of whatever layout it has.

        Args:
            kv_caches: Each layer's tensor.
            blocks: Blocks that the engine's scheduler knows.
            engine: What the configuration says of them.

        Raises:
            LayoutError: A tensor is not what the configuration says.
        """
        layout = engine.layout
        self.blocks = blocks
        self.block_bytes = layout.shard_bytes
        words = _WORDS[ITEM_BYTES[layout.dtype]]
        self.shape = (layout.layers, *_row_shape(engine))
        layers = [_layer(name, kv_caches, blocks, engine, words) for name in engine.layers]
        self.device = layers[0][0].device
        self.planes: list[torch.Tensor] = []
        self.parts: list[tuple[slice | int, ...]] = []
        kinds = len(layers[0])
        for kind in range(kinds):
            views = [layer[kind] for layer in layers]
            # K and V apart have a place each in dimension 1; together, or as MLA's latent, they have none.
            place: tuple[slice | int, ...] = () if kinds == 1 else (kind,)
            whole = _joined(views)
            if whole is not None:
                self.planes.append(whole)
                self.parts.append((slice(None), *place))
            else:
                self.planes += views
                self.parts += [(layer, *place) for layer in range(len(views))]
        self.map = _page_map([layer[0] for layer in layers], blocks) if kinds == 1 else None

    def checked(self, page: int) -> int:
        """Return a page that the pool has.

        Raises:
            IndexError: It does not have it.
        """
        # A negative page would be a valid subscript: another request's bytes under this one's hash.
        if not 0 <= page < self.blocks:
            raise IndexError(f"page {page} of {self.blocks}")
        return page


def _row_shape(engine: EngineFacts) -> tuple[int, ...]:
    tokens = engine.layout.tokens_per_block
    if engine.latent:
        return (tokens, engine.head_size)
    return (2, engine.heads, tokens, engine.head_size)


def _layer(
    name: str, kv_caches: Mapping[str, torch.Tensor], blocks: int, engine: EngineFacts, words: torch.dtype
) -> list[torch.Tensor]:
    """Return a layer's K and V, as one view or as two, with blocks as the first dimension.

    Raises:
        LayoutError: The tensor is not there, or is of a kind that is not known.
    """
    cache = kv_caches.get(name)
    if not isinstance(cache, torch.Tensor):
        kind = type(cache).__name__
        raise LayoutError(f"layer {name} has no KV tensor but {kind}; supported: one tensor each")
    if cache.element_size() != words.itemsize:
        raise LayoutError(f"layer {name} has elements of {cache.dtype}, not {engine.layout.dtype}")
    cache = cache.detach().view(words)
    views = _latent(cache, engine, blocks) if engine.latent else _keys_and_values(cache, engine, blocks)
    row = _row_shape(engine)
    expected = (blocks, *row) if len(views) == 1 else (blocks, *row[1:])
    if not views or any(tuple(view.shape) != expected for view in views):
        raise LayoutError(
            f"layer {name} has a KV tensor of shape {tuple(cache.shape)} for {blocks} blocks of {row}: not a"
            " layout that is known"
        )
    return views


def _latent(cache: torch.Tensor, engine: EngineFacts, blocks: int) -> list[torch.Tensor]:
    tokens, size = _row_shape(engine)
    if cache.dim() == 4 and cache.shape[1] == 1:
        cache = cache[:, 0]
    if cache.dim() != 3 or cache.shape[0] * cache.shape[1] != blocks * tokens or cache.shape[2] != size:
        return []
    if cache.shape[0] != blocks and cache.is_contiguous():
        # The kernels' blocks are smaller than the scheduler's, and follow on each other.
        cache = cache.view(blocks, tokens, size)
    return [cache]


def _keys_and_values(cache: torch.Tensor, engine: EngineFacts, blocks: int) -> list[torch.Tensor]:
    """Bring K and V into the order `[block, (K/V,) head, token, dim]`, whatever lies behind it.

    Up to vLLM 0.26 there are 5 dimensions, `[block, 2, token, head, dim]`, whose strides say whether heads or
    tokens come first in memory; some backends have the first two the other way round. Later ones have
    `[block, head, token, 2 * dim]`, in which each token's K is followed by its V.
    """
    tokens, heads, size = engine.layout.tokens_per_block, engine.heads, engine.head_size
    if cache.dim() == 5 and not engine.on_cpu:
        if cache.shape[0] == 2 and cache.shape[1] == blocks:
            cache = cache.transpose(0, 1)
        return [cache.transpose(2, 3)]
    if tuple(cache.shape) != (blocks, heads, tokens, 2 * size):
        return []
    if not engine.on_cpu:
        return [cache.view(blocks, heads, tokens, 2, size).permute(0, 3, 1, 2, 4)]
    # The CPU's kernels see a head's tokens as first all of K, then all of V, and K as [dim, token].
    block, head, _, _ = cache.stride()
    half, start = tokens * size, cache.storage_offset()
    shape = (blocks, heads, tokens, size)
    plain = (block, head, size, 1)
    keys = (block, head, 1, tokens) if engine.rows == CANONICAL else plain
    return [cache.as_strided(shape, keys, start), cache.as_strided(shape, plain, start + half)]


def _joined(views: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return the layers' views as one, `[blocks, layers, ...]`, if they lie evenly in one storage."""
    first = views[0]
    offsets = [view.storage_offset() for view in views]
    steps = {after - before for before, after in itertools.pairwise(offsets)} or {0}
    memory = first.untyped_storage().data_ptr()
    alike = all(
        view.stride() == first.stride() and view.untyped_storage().data_ptr() == memory for view in views
    )
    step = steps.pop()
    if not alike or steps or step < 0:
        return None
    shape, strides = first.shape, first.stride()
    return first.as_strided(
        (shape[0], len(views), *shape[1:]), (strides[0], step, *strides[1:]), first.storage_offset()
    )


def _page_map(views: Sequence[torch.Tensor], blocks: int) -> PageMap | None:
    if not all(view[0].is_contiguous() for view in views):
        return None
    regions = [
        Region(
            0,
            view.data_ptr(),
            view.stride(0) * view.element_size(),
            view[0].numel() * view.element_size(),
            blocks,
        )
        for view in views
    ]
    return PageMap(regions, 1)
