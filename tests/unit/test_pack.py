"""The pack format: what is written comes back, and nothing else is believed."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import CorruptBlock
from kvtier.hashing import chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3.pack import (
    MAX_PACK_BLOCKS,
    MAX_TAIL_BYTES,
    pack_name,
    read_footer,
    window_blocks,
    write_pack,
)

NAMESPACE = b"n" * 16
MAX_BLOCK = 4096
TRAILER = struct.Struct("<QI4s")


def make_blocks(sizes: list[int], position: int = 0) -> list[StoredBlock]:
    parent = chain_root(NAMESPACE)
    blocks = []
    for place, (block_hash, size) in enumerate(
        zip(hash_blocks(parent, range(len(sizes)), 1), sizes, strict=True)
    ):
        blocks.append(StoredBlock(block_hash, parent, position + place, bytes([place % 256]) * size))
        parent = block_hash
    return blocks


def tail_of(body: bytes) -> bytes:
    return body[-MAX_TAIL_BYTES:]


def with_footer(body: bytes, change: dict[int, bytes], blocks: int) -> bytes:
    """Overwrite bytes of the footer, counted from its start, and make the checksum right again."""
    length = 32 + 48 * blocks
    start = len(body) - TRAILER.size - length
    footer = bytearray(body[start : start + length])
    for at, data in change.items():
        footer[at : at + len(data)] = data
    return body[:start] + footer + TRAILER.pack(xxhash.xxh3_64_intdigest(footer), length, b"KVTE")


@given(
    sizes=st.lists(st.integers(1, MAX_BLOCK), min_size=1, max_size=40),
    position=st.integers(0, 2**32 - 64),
)
def test_footer_says_where_every_block_lies(sizes: list[int], position: int) -> None:
    blocks = make_blocks(sizes, position)
    body, written = write_pack(blocks, NAMESPACE)
    pack = read_footer(tail_of(body), len(body), written.name, NAMESPACE, MAX_BLOCK)
    assert pack == written
    assert pack.size == len(body)
    assert (pack.parent, pack.position) == (blocks[0].parent, position)
    for block, block_hash, offset, length in zip(
        blocks, pack.hashes, pack.offsets, pack.lengths, strict=True
    ):
        assert block_hash == block.hash
        assert body[offset : offset + length] == block.payload


def test_largest_footer_fits_into_one_tail() -> None:
    body, written = write_pack(make_blocks([1] * MAX_PACK_BLOCKS), NAMESPACE)
    assert read_footer(tail_of(body), len(body), written.name, NAMESPACE, MAX_BLOCK) == written


@given(st.data())
@settings(max_examples=300)
def test_flipped_and_truncated_footers_are_refused(data: st.DataObject) -> None:
    body, written = write_pack(make_blocks([100, 50, 70]), NAMESPACE)
    footer_start = written.offsets[-1] + written.lengths[-1]
    if data.draw(st.booleans(), "truncate"):
        damaged = body[: data.draw(st.integers(0, len(body) - 1), "length")]
    else:
        at = data.draw(st.integers(footer_start, len(body) - 1), "at")
        flip = data.draw(st.integers(1, 255), "flip")
        damaged = body[:at] + bytes([body[at] ^ flip]) + body[at + 1 :]
    with pytest.raises(CorruptBlock):
        read_footer(tail_of(damaged), len(damaged), written.name, NAMESPACE, MAX_BLOCK)


@given(st.binary(max_size=400))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptBlock):
        read_footer(data, len(data), b"x" * 16, NAMESPACE, MAX_BLOCK)
    with pytest.raises(CorruptBlock):
        read_footer(
            data + TRAILER.pack(xxhash.xxh3_64_intdigest(data), len(data), b"KVTE"), 2**20, b"", NAMESPACE, 1
        )


def test_pack_of_another_namespace_is_refused() -> None:
    body, written = write_pack(make_blocks([10, 20]), b"o" * 16)
    with pytest.raises(CorruptBlock, match="belongs to namespace"):
        read_footer(tail_of(body), len(body), written.name, NAMESPACE, MAX_BLOCK)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({8: struct.pack("<H", 2)}, "unknown format"),
        ({10: struct.pack("<H", 1)}, "unknown format"),
        ({12: struct.pack("<I", 2)}, "unknown format"),
        ({12: struct.pack("<I", 2**31)}, "unknown format"),
        ({32 + 48 + 16: b"z" * 16}, "not consecutive"),
        ({32 + 48 + 32: struct.pack("<I", 7)}, "not consecutive"),
        ({32 + 36: struct.pack("<Q", 0)}, "impossible block"),
        ({32 + 36: struct.pack("<Q", 2**63)}, "impossible block"),
        ({32 + 44: struct.pack("<I", 0)}, "impossible block"),
        ({32 + 44: struct.pack("<I", MAX_BLOCK + 1)}, "impossible block"),
        ({32 + 44: struct.pack("<I", 101)}, "impossible block"),
        ({32 + 96 + 44: struct.pack("<I", 71)}, "lists blocks up to"),
    ],
)
def test_footers_that_lie_are_refused(change: dict[int, bytes], complaint: str) -> None:
    body, written = write_pack(make_blocks([100, 50, 70]), NAMESPACE)
    assert with_footer(body, {}, 3) == body
    lying = with_footer(body, change, 3)
    with pytest.raises(CorruptBlock, match=complaint):
        read_footer(tail_of(lying), len(lying), written.name, NAMESPACE, MAX_BLOCK)


def test_size_must_be_the_objects() -> None:
    body, written = write_pack(make_blocks([100, 50, 70]), NAMESPACE)
    with pytest.raises(CorruptBlock):
        read_footer(tail_of(body), len(body) - 1, written.name, NAMESPACE, MAX_BLOCK)


def test_name_depends_on_blocks_and_salt() -> None:
    hashes = [bytes([i]) * 16 for i in range(3)]
    names = {pack_name(hashes), pack_name(hashes[:2]), pack_name(hashes[::-1]), pack_name(hashes, b"s")}
    assert len(names) == 4
    assert pack_name(hashes) == pack_name(list(hashes))


@pytest.mark.parametrize(
    ("tokens_per_block", "block_kib", "blocks"),
    [
        (32, 4096, 32),
        (32, 4301, 16),
        (32, 700, 32),
        (32, 1, 32),
        (64, 1, 16),
        (1, 1, 1024),
        (1024, 8, 1),
        (32, 2**19, 1),
    ],
)
def test_window_is_a_power_of_two_within_both_limits(
    tokens_per_block: int, block_kib: int, blocks: int
) -> None:
    layout = BlockLayout("uint8", tokens_per_block, 1, 1, block_kib << 10)
    assert window_blocks(layout) == blocks
    assert window_blocks(replace(layout, shards=1)) == blocks
