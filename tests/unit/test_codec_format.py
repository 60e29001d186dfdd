"""The byte format: what a header says, and that blocks written by earlier releases stay readable."""

from __future__ import annotations

import struct

import pytest

from kvtier.codec import BlockCodec, read_header
from kvtier.errors import CorruptBlock
from kvtier.layout import BlockLayout
from tests.codec_support import (
    DATA,
    FIXED,
    HASH,
    NAMESPACE,
    SECTION,
    read_as_documented,
    real_block,
    reseal,
    small_block,
)


def encoded_block() -> tuple[BlockLayout, bytearray]:
    layout, raw = small_block()
    return layout, bytearray(BlockCodec(layout, NAMESPACE).encode(HASH, raw))


def test_header_describes_the_block() -> None:
    layout, encoded = encoded_block()
    header = read_header(encoded)
    assert header.layout == layout
    assert (header.block_hash, header.namespace) == (HASH, NAMESPACE)
    assert header.total_bytes == len(encoded)
    *frames, rest = header.sections
    assert [(frame.encoding, frame.raw_bytes) for frame in frames] == [(1, 1024), (1, 1024)]
    assert (rest.encoding, rest.stored_bytes, rest.raw_bytes) == (0, 2048, 2048)
    assert rest.offset + rest.stored_bytes == len(encoded)


def test_header_alone_is_enough_to_read_it() -> None:
    _, encoded = encoded_block()
    assert read_header(encoded[: FIXED.size + 3 * SECTION.size + 8]) == read_header(encoded)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_blocks_of_version_1_stay_readable(name: str) -> None:
    """The files were written by the first release, from the first 4,096 elements of four real layers."""
    layout, data = real_block(name)
    item = len(data) // (30 * 2 * layout.row_elements)
    layout = BlockLayout(layout.dtype, 32, 4, 2, 4096)
    rows = [data[i * 6144 * item :][: 4096 * item] for i in range(8)]
    encoded = (DATA / f"block_v1_{name}.bin").read_bytes()
    assert read_header(encoded).codec == 1
    out = bytearray(layout.block_bytes)
    BlockCodec(layout, NAMESPACE).decode(HASH, encoded, out)
    assert out == b"".join(rows) == read_as_documented(encoded)


# Offsets of the header's fields, and values that none of them may have, however well they are checksummed.
IMPOSSIBLE = {
    "magic": (0, "<8s", [b"KVTBLOCk", bytes(8)]),
    "version": (8, "<H", [0, 2, 65535]),
    "codec": (10, "<B", [2, 255]),
    "dtype": (11, "<B", [0, 8, 255]),
    "kind": (12, "<B", [2, 255]),
    "tokens per block": (16, "<I", [0]),
    "shards": (20, "<I", [0, 2, 2**32 - 1]),
    "layers": (24, "<I", [0, 1, 2**31]),
    "kv_factor": (28, "<I", [0, 3, 2**32 - 1]),
    "row_elements": (32, "<I", [0, 511, 2**32 - 1]),
    "sections": (36, "<I", [0, 2, 4, 10**6, 2**32 - 1]),
    "raw length": (40, "<I", [0, 4095, 4097, 2**32 - 1]),
    "total length": (44, "<I", [0, 100, 2**32 - 1]),
    "first encoding": (80, "<I", [0, 3, 2**32 - 1]),
    "first offset": (84, "<I", [0, 159, 161, 2**32 - 1]),
    "first stored length": (88, "<I", [0, 1, 2**32 - 1]),
    "last encoding": (128, "<I", [3, 7]),
    "last offset": (132, "<I", [0, 1, 10**6, 2**32 - 1]),
    "last stored length": (136, "<I", [0, 2047, 2**32 - 1]),
    "last raw length": (140, "<I", [0, 2047, 2**32 - 1]),
}


@pytest.mark.parametrize("field", IMPOSSIBLE)
def test_impossible_headers_are_corrupt_whatever_their_checksum(field: str) -> None:
    _, encoded = encoded_block()
    offset, form, values = IMPOSSIBLE[field]
    for value in values:
        forged = bytearray(encoded)
        struct.pack_into(form, forged, offset, value)
        with pytest.raises(CorruptBlock):
            read_header(reseal(forged))


def test_cut_off_headers_are_corrupt() -> None:
    _, encoded = encoded_block()
    for length in range(FIXED.size + 3 * SECTION.size + 8):
        with pytest.raises(CorruptBlock):
            read_header(encoded[:length])
