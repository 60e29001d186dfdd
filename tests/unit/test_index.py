"""The block index in memory, and the segments that carry it."""

from __future__ import annotations

import random
import struct
import threading
from array import array

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.errors import CorruptBlock
from kvtier.tiers.s3 import segment
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack import MAX_PACK_BLOCKS, Pack
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import read_segment, write_segments

NAMESPACE = b"n" * 16
MAX_BLOCK = 1 << 20
HEAD, PACK, BLOCK = 40, 48, 28


def make_pack(name: int, blocks: list[int], start: int = 16, length: int = 10) -> Pack:
    offsets = array("Q", (start + place * length for place in range(len(blocks))))
    return Pack(
        name.to_bytes(16, "big"),
        start + length * len(blocks) + 100,
        b"p" * 16,
        0,
        tuple(hash_of(number) for number in blocks),
        offsets,
        array("I", [length] * len(blocks)),
    )


def write(packs: list[Pack], namespace: bytes) -> list[bytes]:
    return write_segments(PackTable.of(packs), namespace)


def packs_in(body: bytes) -> list[Pack]:
    table = read_segment(body, NAMESPACE, MAX_BLOCK)
    return [table.pack(place) for place in range(len(table))]


def forget(index: BlockIndex, pack: Pack) -> None:
    index.forget_named([pack.name])


def hash_of(number: int) -> bytes:
    return number.to_bytes(16, "little")


def known(index: BlockIndex, numbers: range) -> list[int]:
    return [number for number in numbers if hash_of(number) in index]


packs = st.lists(
    st.builds(
        make_pack,
        st.integers(0, 2**128 - 1),
        st.lists(st.integers(0, 2**128 - 1), min_size=1, max_size=20),
        st.integers(16, 1000),
        st.integers(1, 5000),
    ),
    max_size=8,
)


@given(packs)
def test_segments_bring_back_what_was_written(wanted: list[Pack]) -> None:
    bodies = write(wanted, NAMESPACE)
    assert len(bodies) == bool(wanted)
    assert [pack for body in bodies for pack in packs_in(body)] == wanted


def test_large_listings_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "MAX_SEGMENT_BYTES", 400)
    wanted = [make_pack(name, [10 * name + i for i in range(4)]) for name in range(10)]
    bodies = write(wanted, NAMESPACE)
    assert len(bodies) > 1
    assert max(map(len, bodies)) <= 400
    assert [pack for body in bodies for pack in packs_in(body)] == wanted


@given(st.data())
@settings(max_examples=300)
def test_damaged_segments_are_refused(data: st.DataObject) -> None:
    [body] = write([make_pack(1, [1, 2, 3]), make_pack(2, [4])], NAMESPACE)
    if data.draw(st.booleans(), "truncate"):
        damaged = body[: data.draw(st.integers(0, len(body) - 1), "length")]
    else:
        at = data.draw(st.integers(0, len(body) - 1), "at")
        damaged = body[:at] + bytes([body[at] ^ data.draw(st.integers(1, 255), "flip")]) + body[at + 1 :]
    with pytest.raises(CorruptBlock):
        read_segment(damaged, NAMESPACE, MAX_BLOCK)


@given(st.binary(max_size=300))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    for foreign in (data, data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))):
        with pytest.raises(CorruptBlock):
            read_segment(foreign, NAMESPACE, MAX_BLOCK)


@pytest.mark.parametrize(
    ("at", "value", "complaint"),
    [
        (8, struct.pack("<H", 9), "unknown format"),
        (12, struct.pack("<I", 3), "unknown format"),
        (16, struct.pack("<I", 2**31), "unknown format"),
        (24, b"o" * 16, "belongs to namespace"),
        (HEAD + 44, struct.pack("<I", 0), "fewer"),
        (HEAD + 44, struct.pack("<I", 2), "more"),
        (HEAD + PACK + 44, struct.pack("<I", 2**32 - 1), "fewer"),
        (HEAD + 32, struct.pack("<Q", 20), "lists blocks up to"),
        (HEAD + 32, struct.pack("<Q", 2**63), "an endless pack"),
        (HEAD + 40, struct.pack("<I", 2**32 - 1), "impossible"),
        (HEAD + 2 * PACK + 16, struct.pack("<Q", 2**60), "impossible block"),
        (HEAD + 2 * PACK + 24, struct.pack("<I", MAX_BLOCK + 1), "impossible block"),
    ],
)
def test_segments_that_lie_are_refused(at: int, value: bytes, complaint: str) -> None:
    [body] = write([make_pack(1, [1, 2, 3]), make_pack(2, [4])], NAMESPACE)
    lying = bytearray(body[:-8])
    lying[at : at + len(value)] = value
    lying += struct.pack("<Q", xxhash.xxh3_64_intdigest(lying))
    with pytest.raises(CorruptBlock, match=complaint):
        read_segment(lying, NAMESPACE, MAX_BLOCK)


@pytest.mark.parametrize("spoil", [{"count": MAX_PACK_BLOCKS + 1}, {"position": 2**32 - 1}])
def test_packs_that_cannot_be_are_refused(spoil: dict[str, int]) -> None:
    table = PackTable.of([make_pack(1, range(MAX_PACK_BLOCKS + 1), 16, 10)])
    if "count" not in spoil:
        table = PackTable.of([make_pack(1, range(2), 16, 10)])
    for column, value in spoil.items():
        table.packs[column] = value
    with pytest.raises(CorruptBlock, match="an impossible pack"):
        table.check(MAX_BLOCK)


def test_match_is_the_longest_leading_run() -> None:
    index = BlockIndex()
    index.add([make_pack(1, [1, 2]), make_pack(2, [4])])
    assert index.match([hash_of(n) for n in (1, 2, 3, 4)]) == 2
    assert index.match([hash_of(n) for n in (3, 1)]) == 0
    assert index.match([hash_of(n) for n in (4, 1, 2)]) == 3
    assert index.match([]) == 0


def test_locations_are_the_packs() -> None:
    index = BlockIndex()
    index.add([make_pack(1, [1, 2, 3]), make_pack(2, [4, 5], start=50)])
    order = [5, 1, 9, 3, 2, 4]
    found = index.locate([hash_of(n) for n in order])
    assert found[2] is None
    assert [place.hash for place in found if place] == [hash_of(n) for n in (5, 1, 3, 2, 4)]
    assert [place.offset for place in found if place] == [60, 16, 36, 26, 50]


def test_the_larger_pack_is_preferred_in_either_order() -> None:
    tail, whole = make_pack(1, [1, 2]), make_pack(2, [1, 2, 3, 4])
    for order in ([tail, whole], [whole, tail]):
        index = BlockIndex()
        index.add(order)
        assert {place.pack.name for place in index.locate([hash_of(1), hash_of(2)]) if place} == {whole.name}
        forget(index, tail)
        assert known(index, range(6)) == [1, 2, 3, 4]


def test_a_forgotten_packs_blocks_come_back_with_another_pack_that_has_them() -> None:
    tail, whole = make_pack(1, [1, 2]), make_pack(2, [1, 2, 3, 4])
    index = BlockIndex()
    index.add([tail, whole])
    forget(index, whole)
    assert known(index, range(6)) == []
    index.add([tail])
    assert known(index, range(6)) == [1, 2]


def test_an_overwritten_pack_replaces_what_was_known() -> None:
    index = BlockIndex()
    old, new = make_pack(1, [1, 2]), make_pack(1, [1, 2], length=20)
    index.add([old])
    [overwritten] = [place.pack for place in index.locate([hash_of(1)]) if place]
    index.add([new])
    assert [place.length for place in index.locate([hash_of(1), hash_of(2)]) if place] == [20, 20]
    index.forget(overwritten)
    assert known(index, range(3)) == [1, 2]


def test_quarantined_locations_stay_away_but_other_locations_do_not() -> None:
    index = BlockIndex()
    pack = make_pack(1, [1, 2, 3])
    index.add([pack])
    assert index.quarantine([hash_of(2), hash_of(2), hash_of(9)]) == 1
    index.add([pack])
    assert known(index, range(4)) == [1, 3]
    assert index.counts() == (2, 1, 1)
    index.add([make_pack(7, [2])])
    assert known(index, range(4)) == [1, 2, 3]


def test_keys_round_trip() -> None:
    for prefix in ("", "team/kv"):
        keys = Keys(prefix, "ab" * 16)
        name = bytes(range(16))
        assert keys.pack_name(keys.pack(name)) == name
        segment_key = keys.new_segment(1234567890)
        assert keys.segment_time(segment_key) == 1234567890
        assert keys.segments_from(1234567890) < segment_key < keys.segments_from(1234567891)
        assert not keys.pack(name).startswith("/")


@pytest.mark.parametrize(
    "key", ["", "x", "p/n/packs/00/zz.kvp", "p/n/packs/01/" + "00" * 16 + ".kvp", "p/n/packs/00/../a"]
)
def test_foreign_keys_are_no_packs(key: str) -> None:
    assert Keys("p", "n").pack_name(key) is None


@pytest.mark.parametrize("key", ["", "p/n/index/1-2.kvi", "p/n/index/" + "9" * 20 + "-00.kvi", "q/index/"])
def test_foreign_keys_are_no_segments(key: str) -> None:
    assert Keys("p", "n").segment_time(key) is None


def test_a_lookup_that_began_before_a_pack_was_forgotten_forgets_no_other() -> None:
    index = BlockIndex()
    index.add([make_pack(1, [1, 2])])
    [old] = [place.pack for place in index.locate([hash_of(1)]) if place]
    index.forget(old)
    index.add([make_pack(1, [1, 2], length=20)])
    index.forget(old)
    assert known(index, range(3)) == [1, 2]


def test_hashes_of_another_length_are_unknown() -> None:
    index = BlockIndex()
    index.add([make_pack(1, [1, 2])])
    assert index.match([hash_of(1), b"short", hash_of(2)]) == 1
    assert index.locate([b"", hash_of(2)])[0] is None
    assert b"x" * 17 not in index


class Truth:
    """What the index must answer, kept the plain way."""

    def __init__(self) -> None:
        self.packs: dict[bytes, Pack] = {}
        self.blocks: dict[bytes, Pack] = {}

    def remove(self, name: bytes) -> None:
        pack = self.packs.pop(name)
        self.blocks = {block: owner for block, owner in self.blocks.items() if owner is not pack}

    def add(self, pack: Pack) -> None:
        known = self.packs.get(pack.name)
        if known is not None and known != pack:
            self.remove(pack.name)
        pack = self.packs.setdefault(pack.name, pack)
        for block in pack.hashes:
            other = self.blocks.get(block)
            if other is None or len(other.hashes) <= len(pack.hashes):
                self.blocks[block] = pack


@pytest.mark.parametrize("seed", range(5))
def test_index_agrees_with_plain_dictionaries(seed: int) -> None:
    """Packs come, change and go, so often that room is made for rows and slots again and again."""
    rng = random.Random(seed)
    print("seed", seed)
    index, truth = BlockIndex(), Truth()
    for _ in range(400):
        batch = []
        for _ in range(rng.randint(1, 5)):
            first = rng.randrange(4000)
            blocks = list(range(first, first + rng.randint(1, 32)))
            batch.append(make_pack(rng.randrange(600), blocks, length=rng.choice([10, 20])))
        # One by one: a batch lets go of all that it replaces first, and so loses less.
        for pack in batch:
            index.add([pack])
            truth.add(pack)
        for name in rng.sample(sorted(truth.packs), min(len(truth.packs), rng.randint(0, 3))):
            index.forget_named([name])
            truth.remove(name)
        wanted = [hash_of(rng.randrange(4100)) for _ in range(50)]
        for block, place in zip(wanted, index.locate(wanted), strict=True):
            pack = truth.blocks.get(block)
            assert (place is None) == (pack is None)
            if place is not None and pack is not None:
                at = pack.hashes.index(block)
                assert place.pack.name == pack.name
                assert (place.offset, place.length) == (pack.offsets[at], pack.lengths[at])
        assert index.counts()[:2] == (len(truth.blocks), len(truth.packs))
    for name, pack in truth.packs.items():
        assert index.pack(name) == pack
    assert sorted(index.names()) == sorted(truth.packs)


def test_lookups_while_the_index_grows_and_shrinks() -> None:
    """Readers take no lock: what stays must be found at any time, with the bytes that are its own."""
    index = BlockIndex()
    steady = make_pack(1, list(range(32)))
    index.add([steady])
    wanted = list(steady.hashes)
    wrong: list[object] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            if index.match(wanted) != 32:
                wrong.append("match")
            for place, offset in zip(index.locate(wanted), steady.offsets, strict=True):
                if place is None or (place.pack.name, place.offset) != (steady.name, offset):
                    wrong.append(place)

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(60):
        others = [
            make_pack(100 + number, list(range(10_000 + 100 * number, 10_050 + 100 * number)))
            for number in range(40 * turn, 40 * turn + 40)
        ]
        index.add(others)
        if turn % 2:
            index.forget_named([pack.name for pack in others])
        if turn % 10 == 9:
            index._compact()
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_blocks_that_come_and_go_for_ever_do_not_fill_the_table() -> None:
    """A small pack is entered anew each time that the larger one with its blocks has gone."""
    index = BlockIndex()
    small, large = make_pack(1, list(range(200))), make_pack(2, list(range(250)))
    for _ in range(100):
        index.add([small])
        index.add([large])
        forget(index, large)
        index.add([small])
        assert len(known(index, range(300))) == 200


def test_rows_of_removed_packs_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtier.tiers.s3.index._FEWEST_DEAD", 500)
    index = BlockIndex()
    kept = make_pack(1, [1, 2, 3])
    index.add([kept])
    for turn in range(200):
        passing = make_pack(2 + turn, list(range(10, 60)))
        index.add([passing])
        forget(index, passing)
    assert index.memory_bytes() < 200_000
    assert index.counts() == (3, 1, 0)
    assert index.pack(kept.name) == kept
    assert known(index, range(100)) == [1, 2, 3]
