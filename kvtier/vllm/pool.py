"""The engine's KV pool, one tensor a layer, as blocks of the one arrangement that kvtier stores."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from kvtier.errors import LayoutError
from kvtier.layout import ITEM_BYTES
from kvtier.vllm.identity import CANONICAL, EngineFacts

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Elements are moved as integers of their size: no bit of them is looked at."""


class LayerPool:
    """The pool as views `[blocks, layers, ...]` whose other dimensions are in the order of a slot.

    Attributes:
        device: Where the pool lies.
        blocks: How many there are.
        planes: Views of the pool. Each is a part of a block's rows: those of one layer, or of all.
        parts: For each plane, the place of its rows in a slot: an index into the slot's view.
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
        self._engine = engine
        self._words = _WORDS[ITEM_BYTES[layout.dtype]]
        self._shape = (layout.layers, *_row_shape(engine))
        by_layer = [self._layer(name, kv_caches) for name in engine.layers]
        self.device = by_layer[0][0].device
        self.planes: list[torch.Tensor] = []
        self.parts: list[tuple[slice | int, ...]] = []
        kinds = len(by_layer[0])
        for kind in range(kinds):
            views = [layer[kind] for layer in by_layer]
            # K and V apart lie at one place of dimension 1 each; together, or as MLA's latent, there is none.
            place: tuple[slice | int, ...] = () if kinds == 1 else (kind,)
            whole = _joined(views)
            if whole is not None:
                self.planes.append(whole)
                self.parts.append((slice(None), *place))
                continue
            self.planes += views
            self.parts += [(layer, *place) for layer in range(len(views))]

    def slot(self, memory: memoryview) -> list[torch.Tensor]:
        """View a slot's bytes as the parts that belong to the planes."""
        whole = torch.frombuffer(memory, dtype=self._words).view(self._shape)
        return [whole[part] for part in self.parts]

    def copy_in(self, slot: Sequence[torch.Tensor], page: int) -> None:
        """Write a block to its page.

        Raises:
            IndexError: A page that the pool does not have.
        """
        self._check(page)
        for plane, part in zip(self.planes, slot, strict=True):
            plane[page].copy_(part, non_blocking=True)

    def copy_out(self, page: int, slot: Sequence[torch.Tensor]) -> None:
        """Read a block from its page.

        Raises:
            IndexError: A page that the pool does not have.
        """
        self._check(page)
        for plane, part in zip(self.planes, slot, strict=True):
            part.copy_(plane[page], non_blocking=True)

    def _check(self, page: int) -> None:
        # A negative page would be a valid subscript: another request's bytes under this one's hash.
        if not 0 <= page < self.blocks:
            raise IndexError(f"page {page} of {self.blocks}")

    def _layer(self, name: str, kv_caches: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Return a layer's K and V, as one view or as two, with blocks as the first dimension.

        Raises:
            LayoutError: The tensor is not there, or is of a kind that is not known.
        """
        cache = kv_caches.get(name)
        if not isinstance(cache, torch.Tensor):
            raise LayoutError(
                f"layer {name} has no KV tensor but {type(cache).__name__}; supported: one tensor each"
            )
        if cache.element_size() != ITEM_BYTES[self._engine.layout.dtype]:
            raise LayoutError(f"layer {name} has elements of {cache.dtype}, not {self._engine.layout.dtype}")
        cache = cache.detach().view(self._words)
        views = (
            _latent(cache, self._engine, self.blocks)
            if self._engine.latent
            else _keys_and_values(cache, self._engine, self.blocks)
        )
        expected = _row_shape(self._engine)
        together = (self.blocks, *expected)
        apart = (self.blocks, *expected[1:])
        if not views or any(tuple(view.shape) != (together if len(views) == 1 else apart) for view in views):
            raise LayoutError(
                f"layer {name} has a KV tensor of shape {tuple(cache.shape)} for {self.blocks} blocks of"
                f" {expected}: not a layout that is known"
            )
        return views


def _row_shape(engine: EngineFacts) -> tuple[int, ...]:
    tokens = engine.layout.tokens_per_block
    if engine.latent:
        return (tokens, engine.head_size)
    return (2, engine.heads, tokens, engine.head_size)


def _latent(cache: torch.Tensor, engine: EngineFacts, blocks: int) -> list[torch.Tensor]:
    tokens, size = _row_shape(engine)
    if cache.dim() == 4 and cache.shape[1] == 1:
        cache = cache[:, 0]
    if cache.dim() != 3 or cache.shape[0] * cache.shape[1] != blocks * tokens or cache.shape[2] < size:
        return []
    if cache.shape[0] != blocks:
        # The kernels' blocks are smaller than the scheduler's, and follow on each other.
        cache = cache.view(blocks, tokens, cache.shape[2])
    return [cache[:, :, :size]]


def _keys_and_values(cache: torch.Tensor, engine: EngineFacts, blocks: int) -> list[torch.Tensor]:
    """Bring K and V into the order `[block, (K/V,) head, token, dim]`, whatever lies behind it.

    vLLM up to 0.26 has 5 dimensions, K and V apart: `[block, 2, token, head, dim]`, whose strides say whether
    heads or tokens come first in memory, with the first two the other way round in some backends. Later
    ones have `[block, head, token, 2 * dim]`, in which each token's K is followed by its V.
    """
    tokens, heads, size = engine.layout.tokens_per_block, engine.heads, engine.head_size
    on_cpu = cache.device.type == "cpu"
    if cache.dim() == 5:
        if cache.shape[0] == 2 and cache.shape[1] == blocks:
            cache = cache.transpose(0, 1)
        return [cache if on_cpu else cache.transpose(2, 3)]
    if tuple(cache.shape) != (blocks, heads, tokens, 2 * size):
        return []
    if not on_cpu:
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
