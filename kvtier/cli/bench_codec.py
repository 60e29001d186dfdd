"""`kvtier bench codec`: ratio and speed of the block codec beside plain zstd, on the user's own KV."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table

from kvtier.codec import BlockCodec
from kvtier.errors import ConfigError, CorruptBlock, LayoutError
from kvtier.layout import ITEM_BYTES, BlockLayout

_DEFAULT_DTYPES = {"uint16": "bfloat16", "uint8": "float8_e4m3fn", "uint32": "float32"}
_SECONDS = 2.5
_PHASE_SECONDS = 0.025
_BLOCK_HASH = b"kvtier.bench.kv."
_NAMESPACE = bytes(16)

Contender = tuple[Callable[[Any], Any], Callable[[Any], Any]]
"""How a codec encodes one block and decodes what came out."""


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
    its times include headers and checksums.

    Args:
        blocks: Raw blocks, `layout.block_bytes` each.
        layout: Their layout.

    Returns:
        For "kvtier", "zstd_1" and "zstd_3" the ratio and the medians of MB/s of raw bytes; medians of
        kvtier's speed relative to zstd level 1 in the same round; "bit_exact".

    Raises:
        CorruptBlock: A block did not come back to the last bit.
    """
    contenders = {"kvtier": _kvtier(layout), "zstd_1": _zstd(1), "zstd_3": _zstd(3)}
    encoded = {name: [encode(block) for block in blocks] for name, (encode, _) in contenders.items()}
    for name, (_, decode) in contenders.items():
        for number, (block, data) in enumerate(zip(blocks, encoded[name], strict=True)):
            if decode(data) != block:
                raise CorruptBlock(f"{name} did not give back block {number} bit by bit")
    raw_bytes = layout.block_bytes * len(blocks)
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    end = time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(speeds["kvtier"]) < 3:
        for name, (encode, decode) in contenders.items():
            speeds[name].append((_speed(encode, blocks, raw_bytes), _speed(decode, encoded[name], raw_bytes)))
    result: dict[str, Any] = {}
    for name, rounds in speeds.items():
        result[name] = {
            "ratio": round(raw_bytes / sum(map(len, encoded[name])), 4),
            "encode_mb_s": round(statistics.median(encode for encode, _ in rounds), 1),
            "decode_mb_s": round(statistics.median(decode for _, decode in rounds), 1),
        }
    pairs = list(zip(speeds["kvtier"], speeds["zstd_1"], strict=True))
    result["encode_vs_zstd_1"] = round(statistics.median(ours[0] / zstd[0] for ours, zstd in pairs), 3)
    result["decode_vs_zstd_1"] = round(statistics.median(ours[1] / zstd[1] for ours, zstd in pairs), 3)
    result["bit_exact"] = True
    return result


def _load(path: Path) -> np.ndarray[Any, Any]:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--input {path}: not a readable .npy file: {error}") from error
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
    layers, kv_factor, tokens = array.shape[1], array.shape[2], array.shape[4]
    try:
        return BlockLayout(dtype, tokens, layers, kv_factor, math.prod(array.shape[3:]))
    except LayoutError as error:
        raise ConfigError(f"--input: {error}") from error


def _kvtier(layout: BlockLayout) -> Contender:
    codec = BlockCodec(layout, _NAMESPACE)
    out = bytearray(layout.block_bytes)

    def decode(data: Any) -> bytearray:
        codec.decode(_BLOCK_HASH, data, out)
        return out

    return lambda block: codec.encode(_BLOCK_HASH, block), decode


def _zstd(level: int) -> Contender:
    return zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress


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
    for name in ("kvtier", "zstd_1", "zstd_3"):
        row = result[name]
        table.add_row(name, f"{row['ratio']:.3f}", f"{row['encode_mb_s']:,.0f}", f"{row['decode_mb_s']:,.0f}")
    table.add_section()
    versus = (f"{result['encode_vs_zstd_1']:.2f} ×", f"{result['decode_vs_zstd_1']:.2f} ×")
    table.add_row(
        "kvtier / zstd_1", f"{result['kvtier']['ratio'] / result['zstd_1']['ratio']:.2f} ×", *versus
    )
    return table
