"""Whatever the bytes, decode gives back the block or raises CorruptBlock: nothing else, no wrong byte."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.codec import BlockCodec, read_header
from kvtier.errors import CorruptBlock
from kvtier.layout import BlockLayout
from tests.codec_support import FIXED, HASH, NAMESPACE, SECTION, real_block, reseal, small_block

SEED = int(os.environ.get("KVTIER_FUZZ_SEED", random.SystemRandom().randrange(2**32)))


@pytest.fixture
def rng() -> random.Random:
    """Seeded anew each run; the seed stands in the output of a failed test and can be given again."""
    print(f"KVTIER_FUZZ_SEED={SEED}")
    return random.Random(SEED)


def small_cases() -> dict[str, tuple[BlockLayout, bytes]]:
    """Small blocks of every scheme: compressed and raw, with and without a rest, one frame and several."""
    layout, bf16 = small_block()
    fp8 = real_block("fp8")[1][:4096]
    text = (b"the same words again and again; " * 200)[:5000]
    return {
        "bf16": (layout, bf16),
        "heads": (BlockLayout("bfloat16", 4, 2, 2, 512, head_dim=32), with_escape(bf16)),
        "fp8 heads": (BlockLayout("float8_e4m3fn", 8, 2, 2, 1024, head_dim=64), fp8),
        "fp8": (BlockLayout("float8_e4m3fn", 8, 2, 2, 1024), fp8),
        "int8": (BlockLayout("int8", 8, 2, 2, 1024), bytes([0, 1, 255, 2] * 1024)),
        "fp32": (BlockLayout("float32", 8, 1, 2, 512), np.linspace(1, 1.5, 1024, dtype=np.float32).tobytes()),
        "uint8": (BlockLayout("uint8", 8, 1, 1, 5000), text),
        "noise": (BlockLayout("bfloat16", 8, 1, 1, 1000), random.Random(4).randbytes(2000)),
        "frames": (BlockLayout("uint8", 8, 1, 1, 300_000), bytes(300_000)),
    }


def with_escape(bf16: bytes) -> bytes:
    """Four elements that are zero: their exponents are far below the others of their channels."""
    values = np.frombuffer(bf16, np.uint16).copy()
    values[[5, 300, 301, 2047]] = 0
    return values.tobytes()


CASES = small_cases()


def must_be_corrupt(codec: BlockCodec, data: bytes | bytearray) -> None:
    with pytest.raises(CorruptBlock):
        codec.decode(HASH, data, bytearray(codec.layout.block_bytes))


@pytest.mark.parametrize("name", CASES)
def test_a_flip_of_any_byte_is_noticed(name: str, rng: random.Random) -> None:
    layout, raw = CASES[name]
    codec = BlockCodec(layout, NAMESPACE)
    encoded = bytearray(codec.encode(HASH, raw))
    for at in range(len(encoded)):
        flip = 1 << rng.randrange(8)
        encoded[at] ^= flip
        must_be_corrupt(codec, encoded)
        encoded[at] ^= flip
    codec.decode(HASH, encoded, bytearray(len(raw)))


@pytest.mark.parametrize("name", CASES)
def test_truncated_and_oversized_bytes_are_noticed(name: str) -> None:
    layout, raw = CASES[name]
    codec = BlockCodec(layout, NAMESPACE)
    encoded = bytes(codec.encode(HASH, raw))
    for length in range(len(encoded)):
        must_be_corrupt(codec, encoded[:length])
    for extra in (b"\0", encoded, bytes(1 << 20)):
        must_be_corrupt(codec, encoded + extra)


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_mutated_real_blocks_are_noticed(name: str, rng: random.Random) -> None:
    layout, raw = real_block(name)
    codec = BlockCodec(layout, NAMESPACE)
    encoded = bytes(codec.encode(HASH, raw))
    for _ in range(1500):
        mutant = mutate(encoded, rng)
        if mutant != encoded:
            must_be_corrupt(codec, mutant)


def mutate(encoded: bytes, rng: random.Random) -> bytearray:
    """Do to a block what disks, networks and bad writers do."""
    mutant = bytearray(encoded)
    at, size = rng.randrange(len(encoded)), rng.choice([1, 8, 512, 4096, 65536])
    other = rng.randrange(len(encoded))
    kind = rng.randrange(6)
    if kind == 0:  # flipped bits
        for _ in range(rng.choice([1, 3, 50])):
            mutant[rng.randrange(len(mutant))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # cut off
        del mutant[at:]
    elif kind == 2:  # a hole of zeros
        mutant[at : at + size] = bytes(len(mutant[at : at + size]))
    elif kind == 3:  # bytes of another place
        mutant[at : at + size] = mutant[other : other + len(mutant[at : at + size])]
    elif kind == 4:  # bytes lost in the middle
        del mutant[at : at + size]
    else:  # bytes too many
        mutant[at:at] = rng.randbytes(size)
    return mutant


@pytest.mark.parametrize("name", CASES)
def test_forged_blocks_with_valid_checksums_raise_nothing_else(name: str, rng: random.Random) -> None:
    """Checksums do not stop a forger: the parser and zstd meet the mutated bytes here."""
    layout, raw = CASES[name]
    codec = BlockCodec(layout, NAMESPACE)
    encoded = bytes(codec.encode(HASH, raw))
    out = bytearray(len(raw))
    refused = 0
    for _ in range(4000):
        forged = bytearray(encoded)
        for _ in range(rng.choice([1, 1, 2, 5])):
            # Mostly in the header, the table and the first bytes of the first frame.
            at = rng.randrange(min(len(forged), rng.choice([FIXED.size, 220, len(forged)])))
            forged[at] = rng.choice([0, 1, 255, rng.randrange(256)])
        if rng.random() < 0.1:
            del forged[rng.randrange(len(forged)) :]
        try:
            codec.decode(HASH, reseal(forged), out)
        except CorruptBlock:
            refused += 1
    assert refused > 0


def with_first_frame(encoded: bytes, frame: bytes) -> bytearray:
    """Put `frame` in the place of a block's first frame, and seal the block again."""
    count = FIXED.unpack_from(encoded)[10]
    sections = [list(SECTION.unpack_from(encoded, FIXED.size + i * SECTION.size)) for i in range(count)]
    start = sections[0][1]
    bodies = [encoded[offset : offset + stored] for _, offset, stored, _, _ in sections]
    bodies[0] = frame
    forged = bytearray(encoded[:start])
    for i, (section, body) in enumerate(zip(sections, bodies, strict=True)):
        section[1:3] = len(forged), len(body)
        SECTION.pack_into(forged, FIXED.size + i * SECTION.size, *section)
        forged += body
    forged[44:48] = len(forged).to_bytes(4, "little")
    return reseal(forged)


FRAMES: dict[str, Callable[[bytes], bytes]] = {
    "too long": lambda plane: zstandard.compress(plane + b"x"),
    "too short": lambda plane: zstandard.compress(plane[:-1]),
    "a bomb": lambda plane: zstandard.compress(bytes(1 << 27)),
    "of unknown length": lambda plane: zstandard.ZstdCompressor(write_content_size=False).compress(plane),
    "cut off": lambda plane: zstandard.compress(plane)[:-5],
    "that lies about its length": lambda plane: lying_frame(len(plane)),
    "of another kind": lambda plane: b"\x1f\x8b" + plane[:50],
    "to be skipped": lambda plane: b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd",
    "missing": lambda plane: b"",
}


def lying_frame(claimed: int) -> bytes:
    """A frame that claims `claimed` bytes and holds a run of 2^20: header, then one last RLE block."""
    header = b"\x28\xb5\x2f\xfd" + b"\xa0" + claimed.to_bytes(4, "little")
    return header + (1 | 1 << 1 | (1 << 20) << 3).to_bytes(4, "little")[:3] + b"A"


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_that_do_not_fit_are_refused_within_bounds(kind: str) -> None:
    layout, raw = small_block(layers=8, row_elements=2048)
    codec = BlockCodec(layout, NAMESPACE)
    encoded = bytes(codec.encode(HASH, raw))
    codec.decode(HASH, encoded, bytearray(len(raw)))
    section = read_header(encoded).sections[0]
    frame = encoded[section.offset : section.offset + section.stored_bytes]
    plane = zstandard.decompress(frame)
    codec.decode(HASH, with_first_frame(encoded, zstandard.compress(plane)), bytearray(len(raw)))
    forged = with_first_frame(encoded, FRAMES[kind](plane))
    out = bytearray(len(raw))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptBlock):
            codec.decode(HASH, forged, out)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(raw)
    finally:
        tracemalloc.stop()
    codec.decode(HASH, encoded, out)
    assert out == raw


def test_more_bytes_than_a_block_can_have_are_refused_unread() -> None:
    layout, raw = CASES["uint8"]
    codec = BlockCodec(layout, NAMESPACE)
    encoded = bytes(codec.encode(HASH, raw))
    section = read_header(encoded).sections[0]
    frame = encoded[section.offset : section.offset + section.stored_bytes]
    must_be_corrupt(codec, with_first_frame(encoded, frame + bytes(codec.max_encoded_bytes)))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_arbitrary_bytes_are_no_block(data: bytes, disguised: bool) -> None:
    layout, raw = CASES["bf16"]
    codec = BlockCodec(layout, NAMESPACE)
    if disguised:
        data = bytes(codec.encode(HASH, raw))[: FIXED.size] + data
    must_be_corrupt(codec, data)
    with pytest.raises(CorruptBlock):
        read_header(data)
