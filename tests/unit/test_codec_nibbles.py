"""Exponent nibbles: exact for every bit pattern, in storage and in slots, and in each out of the other."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.codec import BlockCodec, PlaneSlots, RawSlots, native, read_header, slot_form
from kvtier.codec.nibbles import MAX_ELEMENTS, nibble_shape
from kvtier.errors import CorruptBlock, LayoutError, SlotMisfit
from kvtier.layout import ITEM_BYTES, BlockLayout
from tests.codec_support import (
    DATA,
    FIXED,
    HASH,
    NAMESPACE,
    SECTION,
    read_as_documented,
    real_block,
    real_block_with_heads,
    reseal,
)
from tests.unit.test_codec_fuzz import FRAMES, with_first_frame

RAW, PLANES, NIBBLES = 0, 1, 2


@pytest.fixture(scope="module", autouse=True, params=["at once", "section by section"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the C functions that decode all sections in one call, and without them."""
    functions = native.functions
    assert functions is not None
    if request.param == "section by section":
        native.functions = None
    yield request.param
    native.functions = functions


GUARD = 64


def plane_slots(layout: BlockLayout) -> PlaneSlots:
    form = slot_form(layout, "planes")
    assert isinstance(form, PlaneSlots)
    return form


def decode(codec: BlockCodec, encoded: bytes | memoryview) -> bytes:
    """Decode into room with a guard around it."""
    size = codec.form.slot_bytes
    room = bytearray(b"\xa5" * (size + 2 * GUARD))
    codec.decode(HASH, encoded, memoryview(room)[GUARD:-GUARD])
    assert room[:GUARD] == room[-GUARD:] == b"\xa5" * GUARD
    return bytes(room[GUARD:-GUARD])


def layouts(dtype: str) -> st.SearchStrategy[BlockLayout]:
    small = st.integers(1, 3)

    def build(tokens: int, layers: int, parts: int, heads: int, dim: int, shards: int) -> BlockLayout:
        return BlockLayout(dtype, tokens, layers, parts, heads * tokens * dim, shards, head_dim=dim)

    dims = st.one_of(st.integers(1, 70), st.sampled_from([64, 128, 576]))
    return st.builds(build, st.integers(1, 9), small, small, small, dims, small)


SPECIAL = {
    "bfloat16": [0x0000, 0x8000, 0x0001, 0x807F, 0x0080, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF, 0x3F80],
    "float8_e4m3fn": [0x00, 0x80, 0x01, 0x87, 0x08, 0x7F, 0xFF, 0x78, 0x38, 0xB8],
}


def contents(dtype: str, elements: int) -> st.SearchStrategy[bytes]:
    """Bit patterns: noise, real-looking values, those with a few special ones among them, and constants."""
    bits = 8 * ITEM_BYTES[dtype]

    def build(seed: int, kind: str, share: float) -> bytes:
        rng = np.random.default_rng(seed)
        if kind == "noise":
            values = rng.integers(0, 1 << bits, elements)
        elif kind == "constant":
            values = np.full(elements, rng.choice(SPECIAL[dtype]))
        else:
            floats = (rng.standard_normal(elements) * 2.0 ** rng.integers(-9, 9)).astype(np.float32)
            values = floats.view(np.uint32) >> 16 if bits == 16 else rng.integers(0x20, 0x60, elements)
            values = np.where(rng.random(elements) < share, rng.choice(SPECIAL[dtype], elements), values)
        return values.astype(f"<u{bits // 8}").tobytes()

    return st.builds(
        build,
        st.integers(0, 2**32),
        st.sampled_from(["noise", "constant", "values"]),
        st.sampled_from([0.0, 0.001, 0.01, 0.5]),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_shards_come_together_again(dtype: str, data: st.DataObject) -> None:
    layout = data.draw(layouts(dtype))
    shape = nibble_shape(layout)
    assert shape is not None
    raw = data.draw(contents(dtype, layout.block_bytes // ITEM_BYTES[dtype]))
    part = np.frombuffer(raw, np.uint8)[: layout.shard_bytes]
    planes = shape.room()
    shape.split(part, planes)
    exponents = (
        np.frombuffer(part, np.uint16) >> 7 & 0xFF if dtype == "bfloat16" else part >> 3 & 0x0F
    ).reshape(*shape.raw[:-1], layout.head_dim)
    distances = exponents.max(axis=3, keepdims=True) - exponents
    assert planes.count == (distances >= 15).sum()
    if planes.fits:
        out = np.full(layout.shard_bytes, 0xA5, np.uint8)
        shape.merge(planes, out)
        assert out.tobytes() == part.tobytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_stored_form_goes_into_any_slot_form(data: st.DataObject) -> None:
    layout = data.draw(layouts("bfloat16"))
    raw = data.draw(contents("bfloat16", layout.block_bytes // 2))
    slots = plane_slots(layout)
    codecs = [
        BlockCodec(layout, NAMESPACE),
        BlockCodec(layout, NAMESPACE, slots),
        BlockCodec(replace(layout, head_dim=0), NAMESPACE),
    ]
    slot = bytearray(slots.slot_bytes)
    slots.split(np.frombuffer(raw, np.uint8), memoryview(slot))
    stored = [codecs[0].encode(HASH, raw), codecs[2].encode(HASH, raw)]
    if slots.whole(slot):
        stored.append(codecs[1].encode(HASH, slot))
        assert stored[2] == stored[0]
    for encoded in stored:
        assert len(encoded) <= codecs[0].max_encoded_bytes
        assert decode(codecs[0], encoded) == raw
        assert decode(codecs[2], encoded) == raw
        assert read_as_documented(bytes(encoded)) == raw
        if slots.whole(slot):
            again = np.empty(len(raw), np.uint8)
            slots.merge(decode(codecs[1], encoded), again)
            assert again.tobytes() == raw
        else:
            with pytest.raises(SlotMisfit):
                decode(codecs[1], encoded)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_fp8_blocks_come_back(data: st.DataObject) -> None:
    layout = data.draw(layouts("float8_e4m3fn"))
    raw = data.draw(contents("float8_e4m3fn", layout.block_bytes))
    codec = BlockCodec(layout, NAMESPACE)
    encoded = codec.encode(HASH, raw)
    assert decode(codec, encoded) == raw == read_as_documented(bytes(encoded))


def test_every_exponent_beside_every_other() -> None:
    """Channel e has the largest exponent e; its tokens take all exponents up to it, with every sign."""
    values = np.minimum(np.arange(256)[:, None], np.arange(256)[None, :]).astype(np.uint16) << 7
    values |= (np.arange(256) % 128).astype(np.uint16)[:, None] | (np.arange(256) % 2 << 15).astype(np.uint16)
    shape = nibble_shape(BlockLayout("bfloat16", 256, 1, 1, 65536, head_dim=256))
    assert shape is not None
    planes = shape.room()
    planes.escapes = np.empty(65536, np.uint32)
    shape.split(values.view(np.uint8), planes)
    assert 0 < planes.count < 65536
    out = np.zeros(131072, np.uint8)
    shape.merge(planes, out)
    assert out.tobytes() == values.tobytes()


def test_real_kv_shrinks_as_promised() -> None:
    layout, raw = real_block_with_heads("bf16")
    codec = BlockCodec(layout, NAMESPACE)
    encoded = codec.encode(HASH, raw)
    assert len(raw) / len(encoded) >= 1.5
    header = read_header(encoded)
    assert header.codec == NIBBLES
    assert header.layout.head_dim == 64
    assert all(section.raw_bytes <= 128 << 10 for section in header.sections[:-1])
    assert header.sections[-1].offset % 64 == 0
    assert plane_slots(layout).slot_bytes <= 0.78 * len(raw)
    layout, raw = real_block_with_heads("fp8")
    assert len(raw) / len(BlockCodec(layout, NAMESPACE).encode(HASH, raw)) >= 1.215


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_blocks_of_this_form_stay_readable(name: str) -> None:
    """The files were written when the form was new, from 4,096 elements of each row of four real layers."""
    layout, data = real_block_with_heads(name)
    item = ITEM_BYTES[layout.dtype]
    rows = [data[i * 6144 * item :][: 4096 * item] for i in range(8)]
    layout = BlockLayout(layout.dtype, 32, 4, 2, 4096, head_dim=64)
    encoded = (DATA / f"block_nibbles_{name}.bin").read_bytes()
    assert read_header(encoded).codec == NIBBLES
    assert decode(BlockCodec(layout, NAMESPACE), encoded) == b"".join(rows) == read_as_documented(encoded)


def with_escapes(count: int) -> tuple[BlockLayout, bytes]:
    """A block of 20,000 elements near 1 of which `count` are zero; 100 may be."""
    values = np.random.default_rng(3).uniform(1, 2, 20_000).astype(np.float32).view(np.uint32) >> 16
    values[np.random.default_rng(4).permutation(20_000)[:count]] = 0
    return BlockLayout("bfloat16", 20, 5, 2, 2000, head_dim=50), values.astype(np.uint16).tobytes()


def test_escapes_have_a_limit() -> None:
    layout, raw = with_escapes(100)
    slots = BlockCodec(layout, NAMESPACE, plane_slots(layout))
    encoded = BlockCodec(layout, NAMESPACE).encode(HASH, raw)
    assert read_header(encoded).codec == NIBBLES
    assert decode(slots, encoded)[:4] == (100).to_bytes(4, "little")
    layout, raw = with_escapes(101)
    encoded = BlockCodec(layout, NAMESPACE).encode(HASH, raw)
    assert read_header(encoded).codec == PLANES
    with pytest.raises(SlotMisfit):
        decode(slots, encoded)


def test_slots_with_impossible_escapes_are_not_encoded() -> None:
    layout, raw = with_escapes(3)
    slots = plane_slots(layout)
    codec = BlockCodec(layout, NAMESPACE, slots)
    slot = bytearray(slots.slot_bytes)
    slots.split(np.frombuffer(raw, np.uint8), memoryview(slot))
    # As a GPU leaves them: in any order.
    planes = slots.planes(slot)[0]
    planes.escapes[:3] = planes.escapes[:3][::-1].copy()
    assert codec.encode(HASH, slot) == BlockCodec(layout, NAMESPACE).encode(HASH, raw)
    for forged in (20_000 << 8, int(planes.escapes[1])):
        planes.escapes[0] = forged
        with pytest.raises(ValueError, match="escapes"):
            codec.encode(HASH, slot)
    slot[:4] = (101).to_bytes(4, "little")
    assert not slots.whole(slot)
    with pytest.raises(ValueError, match="escapes"):
        codec.encode(HASH, slot)
    with pytest.raises(ValueError, match="slot"):
        codec.encode(HASH, slot[:-1])


@pytest.mark.parametrize("form", ["raw", "planes"])
def test_forged_escapes_are_corrupt(form: str) -> None:
    layout, raw = with_escapes(5)
    codec = BlockCodec(layout, NAMESPACE, slot_form(layout, form))
    encoded = bytes(BlockCodec(layout, NAMESPACE).encode(HASH, raw))
    assert read_header(encoded).sections[4].stored_bytes == 20
    at = read_header(encoded).sections[4].offset
    first, second = struct.unpack_from("<II", encoded, at)
    decode(codec, reseal(bytearray(encoded)))
    for entries in ([second, first], [first, first], [20_000 << 8], [0xFFFFFFFF]):
        forged = bytearray(encoded)
        struct.pack_into(f"<{len(entries)}I", forged, at + 20 - 4 * len(entries), *entries)
        with pytest.raises(CorruptBlock, match="escapes"):
            decode(codec, reseal(forged))
    # A list that is no whole number of entries, and one that is longer than allowed.
    for stored in (19, 404):
        forged = bytearray(encoded[:at] + bytes(stored) + encoded[at + 20 :])
        for index in (4, 5):
            entry = FIXED.size + index * SECTION.size
            encoding, offset, length, raw_bytes, checksum = SECTION.unpack_from(forged, entry)
            if index == 4:
                length = raw_bytes = stored
            else:
                offset += stored - 20
            SECTION.pack_into(forged, entry, encoding, offset, length, raw_bytes, checksum)
        struct.pack_into("<I", forged, 44, len(forged))
        with pytest.raises(CorruptBlock, match="escapes"):
            decode(codec, reseal(forged))


def test_blocks_of_other_heads_are_readable() -> None:
    """What one node knows of the heads is none of the block's identity."""
    layout, raw = real_block("bf16")
    known = replace(layout, head_dim=64)
    for stored_as in (0, 32, 64):
        encoded = BlockCodec(replace(layout, head_dim=stored_as), NAMESPACE).encode(HASH, raw)
        assert read_header(encoded).codec == (NIBBLES if stored_as else PLANES)
        assert decode(BlockCodec(layout, NAMESPACE), encoded) == raw
        slots = plane_slots(known)
        out = np.empty(len(raw), np.uint8)
        slots.merge(decode(BlockCodec(known, NAMESPACE, slots), encoded), out)
        assert out.tobytes() == raw


def test_headers_name_possible_heads() -> None:
    layout, raw = real_block_with_heads("bf16")
    encoded = BlockCodec(layout, NAMESPACE).encode(HASH, raw)
    for codec, head_dim in ((NIBBLES, 0), (PLANES, 64), (RAW, 64), (NIBBLES, 65535)):
        forged = bytearray(encoded)
        forged[10] = codec
        struct.pack_into("<H", forged, 14, head_dim)
        with pytest.raises(CorruptBlock):
            read_header(reseal(forged))
    for head_dim in (-64, 63, 1 << 20):
        with pytest.raises(LayoutError, match="heads"):
            replace(layout, head_dim=head_dim)


def test_slots_are_raw_where_planes_gain_nothing() -> None:
    layout, _ = real_block_with_heads("bf16")
    fp8, _ = real_block_with_heads("fp8")
    for other in (replace(layout, head_dim=0), replace(layout, dtype="float16"), fp8):
        assert isinstance(slot_form(other, "planes"), RawSlots)
    assert isinstance(slot_form(layout), RawSlots)
    elements = MAX_ELEMENTS // 64
    assert nibble_shape(BlockLayout("bfloat16", 32, 1, 1, MAX_ELEMENTS, head_dim=64)) is not None
    assert nibble_shape(BlockLayout("bfloat16", 1, 65, 1, elements, head_dim=64)) is None
    assert replace(layout, head_dim=0) == layout
    assert "head_dim" not in layout.describe()


def small() -> tuple[BlockLayout, bytes]:
    """Four layers of two real heads, the first four tokens of each."""
    _, data = real_block("bf16")
    rows = np.frombuffer(data, np.uint16).reshape(30, 2, 3, 32, 64)[:4, :, :2, :4]
    return BlockLayout("bfloat16", 4, 4, 2, 512, head_dim=64), rows.tobytes()


@pytest.mark.parametrize("form", ["raw", "planes"])
def test_a_flip_of_any_byte_is_noticed(form: str) -> None:
    layout, raw = small()
    codec = BlockCodec(layout, NAMESPACE, slot_form(layout, form))
    encoded = bytearray(BlockCodec(layout, NAMESPACE).encode(HASH, raw))
    assert read_header(encoded).codec == NIBBLES
    for at in range(len(encoded)):
        encoded[at] ^= 1 << at % 8
        with pytest.raises(CorruptBlock):
            decode(codec, encoded)
        encoded[at] ^= 1 << at % 8
    for length in range(0, len(encoded), 7):
        with pytest.raises(CorruptBlock):
            decode(codec, encoded[:length])
    decode(codec, encoded)


@pytest.mark.parametrize("form", ["raw", "planes"])
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_that_do_not_fit_are_refused(kind: str, form: str) -> None:
    layout, raw = small()
    codec = BlockCodec(layout, NAMESPACE, slot_form(layout, form))
    encoded = bytes(BlockCodec(layout, NAMESPACE).encode(HASH, raw))
    section = read_header(encoded).sections[0]
    bases = zstandard.decompress(encoded[section.offset : section.offset + section.stored_bytes])
    decode(codec, with_first_frame(encoded, zstandard.compress(bases)))
    with pytest.raises(CorruptBlock):
        decode(codec, with_first_frame(encoded, FRAMES[kind](bases)))
    decode(codec, encoded)


def test_threads_share_a_codec_of_plane_slots() -> None:
    layout, raw = small()
    slots = plane_slots(layout)
    codec, writer = BlockCodec(layout, NAMESPACE, slots), BlockCodec(layout, NAMESPACE)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(50):
            block = rng.permutation(np.frombuffer(raw, np.uint16).reshape(16, -1)).tobytes()
            out = np.empty(len(block), np.uint8)
            slots.merge(decode(codec, writer.encode(HASH, block)), out)
            if out.tobytes() != block:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
