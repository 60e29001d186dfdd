"""Real KV for the codec's tests, and a second reader of encoded blocks, written from docs/format.md."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from kvtier.layout import BlockLayout

DATA = Path(__file__).parent / "data"
NAMESPACE = bytes(range(16))
HASH = bytes(range(100, 116))

FIXED = struct.Struct("<8sHBBB3xIIIIIIII16s16s")
SECTION = struct.Struct("<IIIIQ")
DTYPES = {
    1: "bfloat16",
    2: "float16",
    3: "float32",
    4: "float8_e4m3fn",
    5: "float8_e5m2",
    6: "int8",
    7: "uint8",
}


def real_block_with_heads(name: str) -> tuple[BlockLayout, bytes]:
    """The same, and it is known that a head has 64 elements."""
    layout, data = real_block(name)
    return replace(layout, head_dim=64), data


def real_block(name: str) -> tuple[BlockLayout, bytes]:
    """A block of SmolLM2-135M's KV over 32 tokens: "bf16", or the same quantized to "fp8" (e4m3)."""
    block = np.load(DATA / f"kv_{name}.npy", allow_pickle=False)[0]
    layers, kv_factor, heads, tokens, dim = block.shape
    dtype = {"bf16": "bfloat16", "fp8": "float8_e4m3fn"}[name]
    return BlockLayout(dtype, tokens, layers, kv_factor, heads * tokens * dim), block.tobytes()


def small_block(layers: int = 2, row_elements: int = 512) -> tuple[BlockLayout, bytes]:
    """The first elements of the first layers of the real bf16 block: real bytes, but quick to encode."""
    _, data = real_block("bf16")
    rows = np.frombuffer(data, np.uint16).reshape(30, 2, -1)[:layers, :, :row_elements]
    return BlockLayout("bfloat16", 32, layers, 2, row_elements), rows.tobytes()


def reseal(data: bytearray) -> bytearray:
    """Recompute the checksums of an encoded block whose bytes were changed, as a forger would."""
    if len(data) < FIXED.size:
        return data
    count = FIXED.unpack_from(data)[10]
    table_end = FIXED.size + count * SECTION.size
    for at in range(FIXED.size, table_end, SECTION.size):
        if at + SECTION.size > len(data):
            return data
        encoding, offset, stored, raw, _ = SECTION.unpack_from(data, at)
        SECTION.pack_into(
            data, at, encoding, offset, stored, raw, xxhash.xxh3_64_intdigest(data[offset : offset + stored])
        )
    if table_end + 8 <= len(data):
        struct.pack_into("<Q", data, table_end, xxhash.xxh3_64_intdigest(data[:table_end]))
    return data


def read_as_documented(data: bytes) -> bytes:
    """Decode an intact block by the letter of docs/format.md, with none of kvtier's code."""
    _, _, codec, dtype_code, _, _, shards, layers, kv, n, count, raw_bytes, _, _, _ = FIXED.unpack_from(data)
    sections = [SECTION.unpack_from(data, FIXED.size + i * SECTION.size) for i in range(count)]
    stored = [data[offset : offset + length] for _, offset, length, _, _ in sections]
    if codec == 0:
        return stored[0]
    dtype, rows = DTYPES[dtype_code], shards * layers
    if codec == 2:
        return read_nibbles(data, sections, stored)
    plane_bytes = b"".join(
        zstandard.decompress(frame)
        for frame, section in zip(stored, sections, strict=True)
        if section[0] == 1
    )
    plane = np.frombuffer(plane_bytes, np.uint8).reshape(kv, rows, -1).transpose(1, 0, 2)
    if sections[-1][0] == 1:
        return plane.tobytes()
    rest = np.frombuffer(stored[-1], np.uint8).reshape(rows, kv, -1)
    if dtype in ("bfloat16", "float16"):
        bits = plane.astype(np.uint16) << 8 | rest
        raw = bits >> 1 | bits << 15
    elif dtype == "float32":
        byte0, byte1, byte2 = (rest[..., i * n : (i + 1) * n].astype(np.uint32) for i in range(3))
        wide = plane.astype(np.uint32) << 24 | byte2 << 16 | byte1 << 8 | byte0
        raw = wide >> 1 | wide << 31
    else:
        runs = (rows, kv, n // 256, 128)
        high, low = plane.reshape(runs), rest.reshape(runs)
        first, second = high << 4 | low & 15, high & 0xF0 | low >> 4
        rotated = np.stack([first, second], axis=3)
        raw = rotated >> 1 | rotated << 7
        if dtype == "int8":
            raw = np.where(raw & 0x80, raw ^ 0x7F, raw)
    assert raw.nbytes == raw_bytes
    return raw.tobytes()


def read_nibbles(data: bytes, sections: list[tuple[int, ...]], stored: list[bytes]) -> bytes:
    """Decode an intact block of codec 2 by the letter of docs/format.md."""
    dtype, tokens, shards, layers, kv, n = data[11], *struct.unpack_from("<IIIII", data, 16)
    dim = struct.unpack_from("<H", data, 14)[0]
    heads, pairs = n // (tokens * dim), (tokens + 1) // 2
    per_shard = (len(sections) - shards) // shards
    blocks = []
    for shard in range(shards):
        *frames, listed = stored[shard * per_shard : (shard + 1) * per_shard]
        table = sections[shard * per_shard :]
        small = np.frombuffer(b"".join(map(read_section, table, frames)), np.uint8)
        channels = kv * layers * heads * dim
        bases = small[:channels].reshape(kv, layers, heads, 1, dim)
        packed = small[channels:].reshape(kv, layers, heads, pairs, dim)
        nibbles = unpair(packed)[..., :tokens, :]
        exponents = (bases - nibbles).transpose(1, 0, 2, 3, 4).reshape(-1)
        for entry in struct.unpack(f"<{len(listed) // 4}I", listed):
            exponents[entry >> 8] = entry & 0xFF
        rest = np.frombuffer(stored[shards * per_shard + shard], np.uint8)
        if DTYPES[dtype] == "bfloat16":
            wide = rest.astype(np.uint16)
            blocks.append(((wide & 0x80) << 8 | exponents.astype(np.uint16) << 7 | wide & 0x7F).tobytes())
        else:
            low = unpair(rest.reshape(layers, kv, heads, pairs, dim))[..., :tokens, :].reshape(-1)
            blocks.append(((low & 8) << 4 | (exponents & 15) << 3 | low & 7).tobytes())
    return b"".join(blocks)


def read_section(section: tuple[int, ...], data: bytes) -> bytes:
    """Decode a section of codec 2 that is a frame, or nibbles of which one half is."""
    encoding, _, _, raw_bytes, _ = section
    if encoding == 1:
        return zstandard.decompress(data)
    half = (raw_bytes + 1) // 2
    low = np.frombuffer(data[:half], np.uint8)
    high = np.frombuffer(zstandard.decompress(data[half:]), np.uint8)
    first, second = low & 0x33 | (high & 0x33) << 2, low >> 2 & 0x33 | high & 0xCC
    return (first.tobytes() + second.tobytes())[:raw_bytes]


def unpair(packed: np.ndarray) -> np.ndarray:
    """Give each token its nibble: `[..., pairs, dim]` becomes `[..., 2 * pairs, dim]`."""
    *front, pairs, dim = packed.shape
    return np.stack([packed & 15, packed >> 4], axis=-2).reshape(*front, 2 * pairs, dim)
