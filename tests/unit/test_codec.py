"""What goes into the codec comes out to the last bit; what is foreign or misused does not."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.codec import BlockCodec, kernels, read_header
from kvtier.errors import CorruptBlock, LayoutError
from kvtier.layout import ITEM_BYTES, BlockLayout
from tests.codec_support import HASH, NAMESPACE, read_as_documented, real_block, small_block

PLANES, RAW = 1, 0


def round_trip(layout: BlockLayout, raw: bytes) -> memoryview:
    codec = BlockCodec(layout, NAMESPACE)
    encoded = codec.encode(HASH, raw)
    assert len(encoded) <= codec.max_encoded_bytes
    out = bytearray(b"\xa5" * len(raw))
    codec.decode(HASH, encoded, out)
    assert out == raw
    assert read_as_documented(bytes(encoded)) == raw
    return encoded


def layouts(dtype: str | None = None) -> st.SearchStrategy[BlockLayout]:
    small = st.integers(1, 4)
    rows = st.one_of(st.integers(1, 700), st.sampled_from([256, 512, 1024, 4096]))
    dtypes = st.sampled_from(sorted(ITEM_BYTES)) if dtype is None else st.just(dtype)
    return st.builds(BlockLayout, dtypes, small, small, st.integers(1, 3), rows, small)


def contents(size: int) -> st.SearchStrategy[bytes]:
    """Bytes from noise to constant, so that both the planes and the raw fall-back occur."""

    def build(seed: int, kinds: int) -> bytes:
        rng = np.random.default_rng(seed)
        alphabet = rng.integers(0, 256, kinds, dtype=np.uint8)
        return alphabet[rng.integers(0, kinds, size)].tobytes()

    return st.builds(build, st.integers(0, 2**32), st.sampled_from([1, 2, 5, 30, 256, 4096]))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_bytes_of_any_layout_come_back(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    round_trip(layout, data.draw(contents(layout.block_bytes)))


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_bit_pattern_survives_in_the_planes(dtype: str) -> None:
    """Every 8- and 16-bit pattern (NaN payloads, infinities, denormals), every 16-bit half of a float32."""
    item = ITEM_BYTES[dtype]
    patterns = np.arange(65536, dtype=np.uint16).astype(f"<u{item}" if item > 1 else "u1")
    if item == 4:
        patterns = np.concatenate([patterns, patterns << 16])
    # Much of the same around them, or they would be noise and stored raw.
    filler = np.full(9 * patterns.size, patterns[1234], patterns.dtype)
    raw = np.concatenate([patterns, filler]).tobytes()
    layout = BlockLayout(dtype, 32, 5, 2, len(raw) // item // 10)
    assert read_header(round_trip(layout, raw)).codec == PLANES


def test_real_bf16_shrinks_as_promised() -> None:
    layout, raw = real_block("bf16")
    encoded = round_trip(layout, raw)
    assert len(raw) / len(encoded) >= 1.45
    header = read_header(encoded)
    assert header.codec == PLANES
    assert all(section.raw_bytes <= 128 << 10 for section in header.sections[:-1])
    assert header.sections[-1].offset % 64 == 0


def test_real_fp8_shrinks() -> None:
    layout, raw = real_block("fp8")
    assert len(raw) / len(round_trip(layout, raw)) >= 1.17


@pytest.mark.parametrize(("dtype", "at_least"), [("float16", 1.12), ("float32", 1.17), ("int8", 1.08)])
def test_other_dtypes_shrink_on_real_values(dtype: str, at_least: float) -> None:
    layout, data = real_block("bf16")
    values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    rng = np.random.default_rng(5)
    values = values * (1 + rng.uniform(-(2**-9), 2**-9, values.size).astype(np.float32))
    if dtype == "int8":
        rows = values.reshape(-1, 64)
        converted = np.rint(rows / np.abs(rows).max(axis=1, keepdims=True) * 127).astype(np.int8)
    else:
        converted = values.astype(dtype)
    layout = BlockLayout(dtype, 32, layout.layers, 2, layout.row_elements)
    raw = converted.tobytes()
    assert len(raw) / len(round_trip(layout, raw)) >= at_least


def test_plane_is_cut_into_frames_of_k_and_v_apart() -> None:
    """5 shards' K of 60,000 elements a row: 300,000 bytes of plane, so three frames each for K and V."""
    layout = BlockLayout("bfloat16", 32, 1, 2, 60_000, shards=5)
    raw = np.zeros(layout.block_bytes // 2, np.uint16)
    sections = read_header(round_trip(layout, raw.tobytes())).sections
    assert [section.raw_bytes for section in sections] == [100_000] * 6 + [600_000]


def test_noise_is_stored_raw_and_costs_a_header() -> None:
    layout, _ = real_block("bf16")
    raw = np.random.default_rng(1).bytes(layout.block_bytes)
    encoded = round_trip(layout, raw)
    assert read_header(encoded).codec == RAW
    assert len(encoded) == 128 + len(raw)
    assert len(encoded) - len(raw) <= len(raw) // 200


def test_small_gain_is_stored_raw() -> None:
    """Exponents that shrink their plane by 7 % shrink the block by less than 5 %."""
    rng = np.random.default_rng(2)
    exponents = np.where(rng.random(50_000) < 0.3, rng.integers(0, 16, 50_000), rng.integers(0, 255, 50_000))
    assert 0.9 < len(zstandard.compress(exponents.astype(np.uint8).tobytes())) / 50_000 < 0.95
    raw = (exponents.astype(np.uint16) << 7 | rng.integers(0, 128, 50_000).astype(np.uint16)).tobytes()
    assert read_header(round_trip(BlockLayout("bfloat16", 32, 1, 1, 50_000), raw)).codec == RAW


@pytest.mark.parametrize("block_bytes", [2 << 20, 256])
def test_plain_bytes_are_aligned(block_bytes: int) -> None:
    raw = np.random.default_rng(3).bytes(block_bytes)
    layout = BlockLayout("uint8", 32, 1, 1, block_bytes)
    assert read_header(BlockCodec(layout, NAMESPACE).encode(HASH, raw)).sections[0].offset == 128


def test_decode_fills_unaligned_room_and_reads_unaligned_bytes() -> None:
    layout, raw = real_block("bf16")
    codec = BlockCodec(layout, NAMESPACE)
    encoded = memoryview(b"x" + bytes(codec.encode(HASH, memoryview(b"x" + raw)[1:])))[1:]
    room = bytearray(len(raw) + 3)
    codec.decode(HASH, encoded, memoryview(room)[1:-2])
    assert room[1:-2] == raw
    assert room[0] == room[-2] == room[-1] == 0


def test_encoding_leaves_the_block_alone_and_owns_its_result() -> None:
    layout, raw = small_block()
    codec = BlockCodec(layout, NAMESPACE)
    block = bytearray(raw)
    encoded = codec.encode(HASH, block)
    assert block == raw
    before = bytes(encoded)
    codec.encode(HASH, bytes(len(raw)))
    block[:] = bytes(len(raw))
    assert encoded == before
    assert encoded.readonly


def foreign_layouts(layout: BlockLayout) -> list[BlockLayout]:
    def like(**changes: Any) -> BlockLayout:
        return BlockLayout(**{**layout.describe(), **changes})

    return [
        like(tokens_per_block=16),
        like(kind="groups"),
        like(dtype="float16"),
        like(layers=1, shards=2),
        like(layers=4, kv_factor=1),
        like(layers=1, row_elements=1024),
        like(layers=3),
    ]


def test_foreign_blocks_are_refused() -> None:
    layout, raw = small_block()
    codec = BlockCodec(layout, NAMESPACE)
    encoded = codec.encode(HASH, raw)
    with pytest.raises(CorruptBlock, match="another block"):
        codec.decode(bytes(16), encoded, bytearray(len(raw)))
    with pytest.raises(CorruptBlock, match="namespace"):
        BlockCodec(layout, bytes(16)).decode(HASH, encoded, bytearray(len(raw)))
    for other in foreign_layouts(layout):
        with pytest.raises(CorruptBlock, match=r"layout|bytes"):
            BlockCodec(other, NAMESPACE).decode(HASH, encoded, bytearray(other.block_bytes))


def test_misuse_is_a_value_error() -> None:
    layout, raw = small_block()
    codec = BlockCodec(layout, NAMESPACE)
    encoded = codec.encode(HASH, raw)
    for wrong in (raw[:-1], raw + b"x", b""):
        with pytest.raises(ValueError, match="block"):
            codec.encode(HASH, wrong)
    with pytest.raises(ValueError, match="16 bytes"):
        codec.encode(HASH[:-1], raw)
    with pytest.raises(ValueError, match="16 bytes"):
        BlockCodec(layout, b"short")
    with pytest.raises(ValueError, match="block"):
        codec.decode(HASH, encoded, bytearray(len(raw) + 1))
    with pytest.raises(ValueError, match="read-only"):
        codec.decode(HASH, encoded, memoryview(bytes(len(raw))))
    with pytest.raises(LayoutError, match="rings"):
        BlockCodec(BlockLayout("bfloat16", 32, 1, 1, 64, kind="rings"), NAMESPACE)


def test_threads_share_a_codec() -> None:
    layout, raw = small_block(layers=4, row_elements=2048)
    codec = BlockCodec(layout, NAMESPACE)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        rows = np.frombuffer(raw, np.uint16).reshape(8, -1)
        for _ in range(50):
            block = rng.permutation(rows).tobytes()
            out = bytearray(len(block))
            codec.decode(HASH, codec.encode(HASH, block), out)
            if out != block:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "error", [RuntimeError("no locator available"), OSError(30, "Read-only file system")]
)
def test_kernels_compile_where_nothing_can_be_cached(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def njit(signature: Any, *, nogil: bool, cache: bool = False) -> Any:
        def compile_(function: Any) -> Any:
            if cache:
                raise error
            return (function, signature, nogil)

        return compile_

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels.compiled("signature")(print) == (print, "signature", True)
