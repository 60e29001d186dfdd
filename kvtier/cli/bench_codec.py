"""`kvtier bench codec`: ratio and speed of the block codec beside plain zstd, on the user's own KV."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table

from kvtier.codec import BlockCodec, PlaneSlots, slot_form
from kvtier.codec.nibbles import nibble_shape
from kvtier.errors import ConfigError, CorruptBlock, LayoutError
from kvtier.layout import ITEM_BYTES, BlockLayout

_DEFAULT_DTYPES = {"uint16": "bfloat16", "uint8": "float8_e4m3fn", "uint32": "float32"}
_SECONDS = 2.5
_PHASE_SECONDS = 0.025
_BLOCK_HASH = b"kvtier.bench.kv."
_NAMESPACE = bytes(16)

_VERSUS = (
    ("kvtier", "zstd_1", "zstd_1"),
    ("kvtier_plane_slots", "kvtier_without_heads", "without_heads"),
)
"""Who is compared with whom, and what the results are called."""


class Contender(NamedTuple):
    """A way to encode blocks.

    Attributes:
        encode: Encodes one of `inputs`.
        decode: Decodes what came out.
        inputs: The blocks in the form that is encoded.
        restore: Makes the raw block of what `decode` returns.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    inputs: Sequence[Any]
    restore: Callable[[Any], Any] = bytes


def run(input: Path, dtype: str | None, json_out: bool) -> None:
    """Measure on the blocks of `input` and print the outcome.

    Args:
        input: A `.npy` file: an array `[block, ...]` of uint8, uint16 or uint32 that holds the bits of the
            elements. `[block, layer, K/V, head, token, dim]` is taken as such; any other shape as blocks of
            one row each.
        dtype: torch's name of the element type; by default bfloat16 for uint16, float8_e4m3fn for uint8.
        json_out: Print one JSON object instead of a table.

    Raises:
        ConfigError: The file or the dtype does not serve.
        CorruptBlock: A block did not come back to the last bit; nothing is printed then.
    """
    array = _load(input)
    dtype = dtype or _DEFAULT_DTYPES.get(array.dtype.name)
    layout = _layout_of(array, dtype)
    result = {
        "input": str(input),
        "dtype": layout.dtype,
        "blocks": len(array),
        "block_bytes": layout.block_bytes,
        **measure([memoryview(block.reshape(-1).view(np.uint8)) for block in array], layout),
    }
    if json_out:
        print(json.dumps(result))
    else:
        Console().print(_table(result))


def measure(blocks: Sequence[memoryview], layout: BlockLayout) -> dict[str, Any]:
    """Check that every block survives, then time the codec and zstd levels 1 and 3 in turns, on one thread.

    zstd compresses each block as a whole, with contexts that are reused from block to block; what the
    contenders return is dropped at once. kvtier decodes into one given buffer, as it does into the arena;
    its times include headers and checksums. Where it knows the heads and splits exponents into nibbles, it is
    also measured from and to plane slots, and beside the codec that knows nothing of heads.

    Args:
        blocks: Raw blocks, `layout.block_bytes` each.
        layout: Their layout.

    Returns:
        For "kvtier", "zstd_1" and "zstd_3", and where there are such "kvtier_plane_slots" and
        "kvtier_without_heads", the ratio and the medians of MB/s of raw bytes; medians of kvtier's speed
        relative to zstd level 1, and of plane slots relative to the codec without heads, in the same round;
        "bit_exact".

    Raises:
        CorruptBlock: A block did not come back to the last bit.
    """
    contenders = {"kvtier": _kvtier(layout, blocks)}
    if nibble_shape(layout) is not None:
        contenders["kvtier_without_heads"] = _kvtier(replace(layout, head_dim=0), blocks)
    form = slot_form(layout, "planes")
    if isinstance(form, PlaneSlots):
        contenders["kvtier_plane_slots"] = _plane_slots(form, blocks)
    contenders |= {"zstd_1": _zstd(1, blocks), "zstd_3": _zstd(3, blocks)}
    encoded = {name: [way.encode(block) for block in way.inputs] for name, way in contenders.items()}
    for name, way in contenders.items():
        for number, (block, data) in enumerate(zip(blocks, encoded[name], strict=True)):
            if way.restore(way.decode(data)) != block:
                raise CorruptBlock(f"{name} did not give back block {number} bit by bit")
    raw_bytes = layout.block_bytes * len(blocks)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(speeds["kvtier"]) < 3:
        for name, way in contenders.items():
            encode = _speed(way.encode, way.inputs, raw_bytes)
            speeds[name].append((encode, _speed(way.decode, encoded[name], raw_bytes)))
    result: dict[str, Any] = {}
    for name, rounds in speeds.items():
        result[name] = {
            "ratio": round(raw_bytes / sum(map(len, encoded[name])), 4),
            "encode_mb_s": round(statistics.median(encode for encode, _ in rounds), 1),
            "decode_mb_s": round(statistics.median(decode for _, decode in rounds), 1),
        }
    for ours, theirs, suffix in _VERSUS:
        if ours in speeds and theirs in speeds:
            pairs = list(zip(speeds[ours], speeds[theirs], strict=True))
            for index, what in enumerate(("encode", "decode")):
                ratio = statistics.median(mine[index] / other[index] for mine, other in pairs)
                result[f"{what}_vs_{suffix}"] = round(ratio, 3)
    result["bit_exact"] = True
    return result


def _load(path: Path) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--input {path}: is no array of numbers in a .npy file") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2 or array.size == 0:
        raise ConfigError(f"--input {path}: expected an array [block, ...] with at least one element")
    return np.ascontiguousarray(array)


def _layout_of(array: np.ndarray[Any, Any], dtype: str | None) -> BlockLayout:
    if dtype not in ITEM_BYTES or ITEM_BYTES[dtype] != array.dtype.itemsize:
        allowed = ", ".join(name for name, size in ITEM_BYTES.items() if size == array.dtype.itemsize)
        raise ConfigError(
            f"--dtype {dtype}: an array of {array.dtype.name} can hold: {allowed or 'nothing known'}"
        )
    if array.ndim != 6:
        array = array.reshape(len(array), 1, 1, 1, 1, -1)
        head_dim = 0
    else:
        head_dim = array.shape[5]
    layers, kv_factor, tokens = array.shape[1], array.shape[2], array.shape[4]
    try:
        return BlockLayout(dtype, tokens, layers, kv_factor, math.prod(array.shape[3:]), head_dim=head_dim)
    except LayoutError as error:
        raise ConfigError(f"--input: {error}") from error


def _kvtier(layout: BlockLayout, blocks: Sequence[memoryview]) -> Contender:
    codec = BlockCodec(layout, _NAMESPACE)
    out = bytearray(layout.block_bytes)

    def decode(data: Any) -> bytearray:
        codec.decode(_BLOCK_HASH, data, out)
        return out

    return Contender(lambda block: codec.encode(_BLOCK_HASH, block), decode, blocks)


def _plane_slots(form: PlaneSlots, blocks: Sequence[memoryview]) -> Contender:
    codec = BlockCodec(form.layout, _NAMESPACE, form)
    slots = [bytearray(form.slot_bytes) for _ in blocks]
    for block, slot in zip(blocks, slots, strict=True):
        form.split(np.frombuffer(block, np.uint8), slot)
        if not form.whole(slot):
            raise ConfigError("--input: a block has too many escapes for plane slots")
    out = bytearray(form.slot_bytes)

    def decode(data: Any) -> bytearray:
        codec.decode(_BLOCK_HASH, data, out)
        return out

    def restore(slot: bytearray) -> bytes:
        raw = np.empty(form.layout.block_bytes, np.uint8)
        form.merge(slot, raw)
        return raw.tobytes()

    return Contender(lambda slot: codec.encode(_BLOCK_HASH, slot), decode, slots, restore)


def _zstd(level: int, blocks: Sequence[memoryview]) -> Contender:
    return Contender(
        zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress, blocks
    )


def _speed(work: Callable[[Any], Any], inputs: Sequence[Any], raw_bytes: int) -> float:
    """Do `work` on all inputs, again and again for a short while; return MB of raw bytes per CPU second.

    The thread's CPU time, so that other processes on the machine disturb less.
    """
    start = time.thread_time()
    passes, elapsed = 0, 0.0
    while elapsed < _PHASE_SECONDS:
        for each in inputs:
            work(each)
        passes += 1
        elapsed = time.thread_time() - start
    return passes * raw_bytes / elapsed / 1e6


def _table(result: dict[str, Any]) -> Table:
    title = f"{result['blocks']} blocks of {result['block_bytes']:,} bytes, {result['dtype']}, bit-exact"
    table = Table(title=title)
    table.add_column("codec")
    for heading in ("ratio", "encode MB/s", "decode MB/s"):
        table.add_column(heading, justify="right")
    for name in ("kvtier", "kvtier_plane_slots", "kvtier_without_heads", "zstd_1", "zstd_3"):
        if name in result:
            row = result[name]
            speeds = (f"{row['encode_mb_s']:,.0f}", f"{row['decode_mb_s']:,.0f}")
            table.add_row(name, f"{row['ratio']:.3f}", *speeds)
    table.add_section()
    for ours, theirs, suffix in _VERSUS:
        if f"encode_vs_{suffix}" in result:
            versus = (f"{result[f'{what}_vs_{suffix}']:.2f} ×" for what in ("encode", "decode"))
            ratio = result[ours]["ratio"] / result[theirs]["ratio"]
            table.add_row(f"{ours} / {theirs}", f"{ratio:.2f} ×", *versus)
    return table
