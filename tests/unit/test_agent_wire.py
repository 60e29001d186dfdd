"""Messages between agent and clients: what is no message is refused, and nothing else happens."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.agent import wire

U64 = st.integers(0, 2**64 - 1)
RUNS = st.lists(st.tuples(st.binary(), st.integers(0, 2**40), st.binary()))
REQUESTS = st.one_of(
    st.builds(wire.Ready, U64, U64),
    st.builds(wire.Ping, U64, U64),
    st.builds(wire.MatchBlocks, U64, U64, st.binary(), st.floats(0, 10)),
    st.builds(wire.Hold, U64, U64, U64),
    st.builds(wire.Release, U64, U64, U64, st.integers(-1, 100)),
    st.builds(wire.Reserve, U64, U64, RUNS),
    st.builds(wire.Commit, U64, U64, st.binary(), st.integers(0, 100)),
    st.builds(wire.Abort, U64, U64, st.binary(), st.integers(-1, 100)),
    st.builds(wire.Stats, U64, U64),
    st.builds(wire.Flush, U64, U64, st.floats(0, 10)),
    st.builds(wire.Leave, U64, U64, U64, st.binary(), st.lists(st.integers(0, 100)), st.binary()),
    st.builds(wire.Fetch, U64, U64, U64),
)
REPLIES = st.one_of(
    st.builds(wire.Matched, U64, U64, st.binary(), st.dictionaries(st.text(), st.integers(0, 100))),
    st.builds(wire.Reserved, U64, st.binary()),
    st.builds(wire.Done, U64, st.booleans()),
    st.builds(wire.Note, U64, st.binary(), st.binary()),
    st.builds(wire.Numbers, U64, st.dictionaries(st.text(), st.integers(0, 100))),
)


@given(REQUESTS)
def test_requests_arrive_as_sent(request):
    assert wire.decode_request(wire.encode(request)) == request


@given(REPLIES)
def test_replies_arrive_as_sent(reply):
    assert wire.decode_reply(wire.encode(reply)) == reply


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_wire_error(data):
    for decode in (wire.decode_request, wire.decode_reply, wire.decode_attach, wire.decode_answer):
        try:
            decode(data)
        except wire.WireError:
            continue


@given(REQUESTS, st.data())
def test_damaged_requests_are_requests_or_wire_errors(request, data):
    message = bytearray(wire.encode(request))
    place = data.draw(st.integers(0, len(message) - 1))
    message[place] ^= data.draw(st.integers(1, 255))
    try:
        wire.decode_request(bytes(message[: data.draw(st.integers(0, len(message)))]))
    except wire.WireError:
        return


@pytest.mark.parametrize(
    "message",
    [
        ["match", 1, 2, b"x" * 16],
        ["match", 1, 2, "text", 0.5],
        ["match", -1.5, 2, b"", 0.5],
        ["match", 1, 2, [0] * 16, 0.5],
        ["nonsense", 1, 2],
        ["commit", 1, 2, b"", None],
        {"type": "ping"},
        [],
        None,
    ],
    ids=str,
)
def test_wrong_types_are_refused(message):
    with pytest.raises(wire.WireError):
        wire.decode_request(msgspec.msgpack.encode(message))


def test_messages_that_are_too_long_are_not_decoded():
    with pytest.raises(wire.WireError, match="over the limit"):
        wire.decode_request(bytes(wire.MAX_MESSAGE_BYTES + 1))


def test_deep_nesting_is_no_crash():
    with pytest.raises(wire.WireError):
        wire.decode_request(b"\x91" * 100_000)


def test_frames():
    message = wire.Refused("no")
    frame = wire.frame(message)
    header, payload = frame[: wire.FRAME_HEADER_BYTES], frame[wire.FRAME_HEADER_BYTES :]
    assert wire.frame_length(header) == len(payload)
    assert wire.decode_answer(payload) == message
    with pytest.raises(wire.WireError, match="no kvtier"):
        wire.frame_length(b"HTTP" + header[4:])
    with pytest.raises(wire.VersionMismatch) as caught:
        wire.frame_length(header[:4] + (77).to_bytes(4, "little") + header[8:])
    assert caught.value.theirs == 77
    assert str(wire.PROTOCOL_VERSION) in str(caught.value)
    assert "77" in str(caught.value)
    with pytest.raises(wire.WireError, match="over the limit"):
        wire.frame_length(header[:8] + b"\xff\xff\xff\xff")


@given(st.lists(U64, max_size=50))
def test_numbers_are_packed_and_unpacked(numbers):
    assert list(wire.unpack_numbers(wire.pack_numbers(numbers, "Q"), "Q")) == numbers


def test_blobs_of_a_wrong_length_are_refused():
    with pytest.raises(wire.WireError):
        wire.unpack_numbers(b"123", "Q")
    with pytest.raises(wire.WireError):
        wire.split_hashes(b"x" * 17)
    with pytest.raises(wire.WireError):
        wire.split_hashes(bytes(16 * (wire.MAX_BLOCKS + 1)))
    assert wire.split_hashes(b"a" * 16 + b"b" * 16) == [b"a" * 16, b"b" * 16]


@pytest.mark.parametrize(
    ("asked", "given_"), [(0.5, 0.5), (-1.0, 0.0), (float("nan"), 0.0), (float("inf"), 0.0), (1e9, 60.0)]
)
def test_waits_are_bounded(asked, given_):
    assert wire.bounded_wait(asked) == given_


def test_messages_are_arrays_that_begin_with_their_name():
    message = wire.encode(wire.MatchBlocks(1, 2, b"h" * 16, 0.5))
    assert msgspec.msgpack.decode(message) == ["match", 1, 2, b"h" * 16, 0.5, 0.0, 0.0]
