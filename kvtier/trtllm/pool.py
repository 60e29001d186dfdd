"""The engine's KV pool: which kinds are supported, and where blocks lie in it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Protocol

import torch

from kvtier.errors import LayoutError
from kvtier.gpu.ranges import NO_PAGE as NO_PAGE
from kvtier.gpu.ranges import PageMap, Region
from kvtier.layout import ITEM_BYTES, BlockLayout
from kvtier.trtllm.fields import as_int, as_text, dig
from kvtier.trtllm.identity import DEFAULT_TOKENS_PER_BLOCK, EngineFacts, torch_name

_HEAD_DIMS = (128, 64, 96, 80, 112, 192, 256)


@dataclass(frozen=True, slots=True)
class PageGroup:
    """One space of page ids.

    Attributes:
        id: Index of its list among the engine's lists of pages.
        window: Tokens of its attention window, None for full attention.
    """

    id: int
    window: int | None = None


class Pool(Protocol):
    """The blocks of one rank. `layout` has one shard: this rank's part of a block.

    Attributes:
        layout: Geometry of this rank's part of a block.
        groups: The spaces of page ids, in the order of `Pages`.
        device: Where the bytes lie.
        signature: What else tells this arrangement from another, plain JSON data.
        replicated: Whether all ranks hold the same bytes, as with MLA, whose latents have no heads to split.
        map: Where that part of a block lies that this rank saves; the pool keeps the memory alive.
        loads: Where that part lies that this rank loads; its host memory counts from where `map`'s does.
    """

    layout: BlockLayout
    groups: tuple[PageGroup, ...]
    device: torch.device
    signature: dict[str, Any]
    replicated: bool
    map: PageMap
    loads: PageMap


class FlatPool:
    """One tensor `[num_blocks, layers, kv_factor, row]`; block ids index its first dimension."""

    def __init__(self, tensor: torch.Tensor, engine: EngineFacts) -> None:
        """Check the tensor against what kvtier supports.

        Raises:
            LayoutError: The pool is refused; the message says why.
        """
        tokens_per_block = _check_flat(tensor, engine)
        _, layers, kv_factor, row = tensor.shape
        head_dim = _head_dim(engine, kv_factor, row, tokens_per_block)
        self.layout = BlockLayout(
            _name(tensor.dtype), tokens_per_block, layers, kv_factor, row, head_dim=head_dim
        )
        self.groups: tuple[PageGroup, ...] = (PageGroup(0),)
        self.device = tensor.device
        self.signature: dict[str, Any] = {"kind": "flat"}
        self.replicated = kv_factor == 1
        self._memory = tensor.detach()
        size = self.layout.shard_bytes
        self.map = self.loads = PageMap([Region(0, tensor.data_ptr(), size, size, tensor.shape[0])], 1)


class GroupPool:
    """Pages in several layer groups; a block is the concatenation of its pages' regions, group by group.

    Regions that are equal on all ranks are stored once: each rank saves its share of their bytes behind its
    own, and loads everybody's.
    """

    def __init__(self, description: Any, engine: EngineFacts, rank: int = 0) -> None:
        """Read the engine's description of its pools, for one of its ranks.

        Raises:
            LayoutError: The pools are refused; the message says why.
        """
        tokens_per_block = as_int(description.tokens_per_block) or DEFAULT_TOKENS_PER_BLOCK
        described = sorted(description.groups, key=lambda group: int(group.layer_group_id))
        _check_groups(described, tokens_per_block, engine)
        self.groups = tuple(
            PageGroup(int(group.layer_group_id), as_int(dig(group, "window_size"))) for group in described
        )
        self._memory: list[torch.Tensor] = []
        own, equal = self._regions(described, "regions"), self._regions(described, "replicated_regions")
        self.device = self._memory[0].device
        layout = _group_layout(described, _size(own), tokens_per_block, dig(description, "dtype"), engine)
        self.replicated = _is_latent(described, layout, engine)
        share, odd = divmod(_size(equal), engine.ranks)
        if self.replicated or odd:
            own, equal, share = own + equal, [], 0
        size = _size(own) + share
        if size != layout.shard_bytes:
            layout = BlockLayout("uint8", tokens_per_block, 1, 1, size, kind="groups")
        self.layout = layout
        self.signature = {"kind": "groups", "groups": [_group_signature(group) for group in described]}
        shares = [_cut(equal, other * share, share) for other in range(engine.ranks)]
        # Shards lie side by side in a slot, and each ends with its rank's share.
        starts = _one_by_one(own, 0)
        for other, regions in enumerate(shares):
            starts += _one_by_one(regions, (other - rank) * size + _size(own))
        count = len(described)
        self.map = PageMap([*own, *shares[rank]], count, sparse=True)
        self.loads = PageMap([*own, *chain.from_iterable(shares)], count, sparse=True, starts=starts)

    def _regions(self, described: Sequence[Any], kind: str) -> list[Region]:
        """Return the regions of one kind of all groups, and keep their memory."""
        regions = []
        for index, group in enumerate(described):
            for region in dig(group, kind) or ():
                rows = _region_rows(region)
                self._memory.append(rows)
                pages, size = rows.shape
                regions.append(Region(index, rows.data_ptr(), rows.stride(0), size, pages))
        return regions


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _head_dim(engine: EngineFacts, kv_factor: int, row: int, tokens: int) -> int:
    """Return the elements of one head of one token, 0 if none will do; a latent is one head.

    Where the model's configuration does not say it, it is guessed: a wrong guess costs compression alone.
    """
    sizes = (row // tokens,) if kv_factor == 1 else (engine.head_dim or 0, *_HEAD_DIMS)
    return next((size for size in sizes if size > 0 and row % (size * tokens) == 0), 0)


def _check_flat(tensor: torch.Tensor, engine: EngineFacts) -> int:
    """Return the tokens per block of a pool that is supported, and refuse any other."""
    engine.refuse_unsupported()
    if tensor.dim() != 4:
        raise LayoutError(
            f"the KV pool has shape {tuple(tensor.shape)}; supported: [blocks, layers, kv_factor, row]"
        )
    _, layers, kv_factor, row = tensor.shape
    if engine.kv_dtype and ("fp4" in engine.kv_dtype or "float4" in engine.kv_dtype):
        raise LayoutError(
            "an NVFP4 KV cache keeps its scales outside the pool that a connector is given; use fp8 or auto"
        )
    if not tensor.is_contiguous():
        raise LayoutError(f"the KV pool is not contiguous (strides {tensor.stride()})")
    if kv_factor not in (1, 2):
        raise LayoutError(f"the KV pool has {kv_factor} parts per layer; supported: 2 (K and V) or 1 (MLA)")
    if engine.attention_layers not in (None, layers) and engine.plain_ranks:
        raise LayoutError(
            f"the KV pool holds {layers} layers, the model has {engine.attention_layers} with attention:"
            " layers of different shape (variable GQA) lie in pools that a connector is not given"
        )
    if engine.window is not None:
        raise LayoutError(
            f"kv_cache_config.max_attention_window is {engine.window}: which pages it has passed is not told"
            " for this kind of pool; leave it out, or use KV cache manager V2"
        )
    tokens_per_block = engine.tokens_per_block or DEFAULT_TOKENS_PER_BLOCK
    elements = engine.latent_elements if kv_factor == 1 else engine.head_elements
    if elements and row % elements == 0 and row != tokens_per_block * elements:
        if kv_factor == 2:
            raise LayoutError(
                f"a row of the KV pool holds {row // elements} tokens of {elements} elements,"
                f" kv_cache_config.tokens_per_block says {tokens_per_block}"
            )
        # For MLA the engine may choose another number (64 for FlashMLA) and does not tell.
        tokens_per_block = row // elements
    if row % tokens_per_block:
        raise LayoutError(
            f"rows of {row} elements do not divide by kv_cache_config.tokens_per_block = {tokens_per_block}"
        )
    return tokens_per_block


def _check_groups(described: Sequence[Any], tokens_per_block: int, engine: EngineFacts) -> None:
    engine.refuse_unsupported()
    if engine.tokens_per_block not in (None, tokens_per_block):
        raise LayoutError(
            f"the KV cache has {tokens_per_block} tokens per page, kv_cache_config.tokens_per_block says"
            f" {engine.tokens_per_block}"
        )
    if not any(region.size for group in described for region in group.regions):
        raise LayoutError("the KV cache describes no pages")
    for group in described:
        for region in (*group.regions, *(dig(group, "replicated_regions") or ())):
            for buffer in dig(region, "buffers") or ():
                if (as_int(dig(buffer, "expansion")) or 1) != 1:
                    raise LayoutError(
                        f"layer {buffer.layer_id} has pages of its own size (expansion {buffer.expansion}):"
                        " one block must be the same tokens in every layer"
                    )


def _region_rows(region: Any) -> torch.Tensor:
    """Return a region as uint8 `[num_slots, size]`."""
    slots, size, stride = int(region.num_slots), int(region.size), int(region.stride)
    try:
        rows = region.as_tensor()
    except Exception as error:
        # Without a GPU the engine's own view cannot be made; its addresses then are host addresses.
        if torch.cuda.is_available():
            raise LayoutError(f"the engine gives no view of its KV pages: {error}") from error
        rows = None
    if isinstance(rows, torch.Tensor) and rows.dtype == torch.uint8 and tuple(rows.shape) == (slots, size):
        return rows
    if torch.cuda.is_available():
        raise LayoutError("the engine's view of its KV pages is not uint8 [slots, size]")
    length = (slots - 1) * stride + size
    whole = torch.frombuffer((ctypes.c_uint8 * length).from_address(int(region.base)), dtype=torch.uint8)
    return whole.as_strided((slots, size), (stride, 1))


def _size(regions: Sequence[Region]) -> int:
    """Return the bytes of one page of all regions."""
    return sum(region.size for region in regions)


def _one_by_one(regions: Sequence[Region], first: int) -> list[int]:
    """Return where regions begin that stand one after the other from `first` on."""
    return list(accumulate((region.size for region in regions), initial=first))[:-1]


def _cut(regions: Sequence[Region], start: int, length: int) -> list[Region]:
    """Return the regions of some of the bytes of a page, those from `start` on."""
    cut = []
    for region, first in zip(regions, _one_by_one(regions, 0), strict=True):
        skip, end = max(0, start - first), min(region.size, start + length - first)
        if skip < end:
            cut.append(region._replace(base=region.base + skip, size=end - skip))
    return cut


def _buffers(described: Sequence[Any]) -> list[Any]:
    """Return the buffers that differ from rank to rank."""
    return [
        buffer for group in described for region in group.regions for buffer in dig(region, "buffers") or ()
    ]


def _is_latent(described: Sequence[Any], layout: BlockLayout, engine: EngineFacts) -> bool:
    """Say whether what may differ from rank to rank is certain to be MLA's latents alone, which do not."""
    roles = {str(buffer.role) for buffer in _buffers(described)}
    row = (engine.latent_elements or 0) * layout.tokens_per_block
    return roles == {"key"} and layout.kv_factor == 1 and layout.row_elements == row


def _group_layout(
    described: Sequence[Any], size: int, tokens_per_block: int, dtype: object, engine: EngineFacts
) -> BlockLayout:
    """Describe a page as rows of keys and values if it is nothing else, as plain bytes if it is not."""
    name = _element_type(dtype, engine)
    buffers = _buffers(described)
    roles = sorted({str(buffer.role) for buffer in buffers})
    uniform = all(
        int(region.size) * len(buffers) == size * len(dig(region, "buffers") or ())
        for group in described
        for region in group.regions
    )
    if name and uniform and roles in (["key", "value"], ["key"]) and buffers:
        layers, rest = divmod(len(buffers), len(roles))
        row, odd = divmod(size, len(buffers) * ITEM_BYTES[name])
        if not rest and not odd:
            head_dim = _head_dim(engine, len(roles), row, tokens_per_block)
            return BlockLayout(
                name, tokens_per_block, layers, len(roles), row, kind="groups", head_dim=head_dim
            )
    return BlockLayout("uint8", tokens_per_block, 1, 1, size, kind="groups")


def _element_type(dtype: object, engine: EngineFacts) -> str | None:
    if isinstance(dtype, torch.dtype):
        name: str | None = _name(dtype)
    else:
        told = as_text(dtype) or engine.kv_dtype or engine.model_dtype
        name = torch_name(told) if told else None
    return name if name in ITEM_BYTES else None


def _group_signature(group: Any) -> dict[str, Any]:
    signature = {
        "layers": [int(layer) for layer in dig(group, "layer_ids") or ()],
        "window": as_int(dig(group, "window_size")),
        "regions": _region_signature(group.regions),
    }
    replicated = dig(group, "replicated_regions")
    return {**signature, "replicated": _region_signature(replicated)} if replicated else signature


def _region_signature(regions: Sequence[Any]) -> list[Any]:
    return [
        [int(region.size), [[int(b.layer_id), str(b.role)] for b in dig(region, "buffers") or ()]]
        for region in regions
    ]
