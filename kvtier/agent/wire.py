"""What agent and clients say to each other.

Two sockets lie in the agent's directory:

- The *door*, a plain Unix stream socket. A client sends one `Attach` and gets an `Attached`, with the
  arena's descriptor beside it (SCM_RIGHTS), or a `Refused`. Each is a frame: magic, protocol version, length,
  msgpack. The version stands in the frame so that it can be told whatever the payload looks like. The
  connection then stays open without a word: the kernel closes it when either process dies.
- The *desk*, a ZeroMQ ROUTER, for everything else: one msgpack message each way, of the types below. A
  request with id 0 gets no answer.

All payloads are typed msgspec structs, encoded as arrays, bounded in size before they are decoded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from kvtier.hashing import HASH_BYTES

PROTOCOL_VERSION = 5
"""Goes up whenever a message or its meaning changes; agent and client have to agree on it."""

DOOR = "door"
DESK = "desk"
"""Names of the two sockets in the agent's directory."""

MAX_MESSAGE_BYTES = 4 << 20
MAX_FRAME_BYTES = 1 << 20
MAX_BLOCKS = 1 << 17
"""Blocks in one request: 4 million tokens in blocks of 32."""

MAX_RANKS = 1024
"""Processes of one engine on one node, and shards of one block."""

MAX_WAIT_SECONDS = 60.0
NO_TICKET = 0xFFFFFFFFFFFFFFFF

_FRAME = struct.Struct("<4sII")
_MAGIC = b"kvtA"
FRAME_HEADER_BYTES = _FRAME.size


class WireError(Exception):
    """A message that is none of this protocol."""


class VersionMismatch(WireError):
    """The other side speaks another version of the protocol."""

    def __init__(self, theirs: int) -> None:
        super().__init__(f"protocol version {theirs} there, {PROTOCOL_VERSION} here")
        self.theirs = theirs


class Attach(msgspec.Struct, array_like=True, tag="attach"):
    """A client's wish to use one namespace's store.

    Attributes:
        facts: The namespace's facts, JSON.
        namespace: Id of the namespace, 16 bytes.
        layout: Fields of the `BlockLayout`.
        group: Name of the engine that the client belongs to.
        rank: The client's place in it.
        ranks: How many clients the engine has.
        slot_format: The form of slots that the client reads and fills: "raw" or "planes".
        slot_bytes: Bytes of such a slot.
        pins: Whether the client pins the arena: then a GPU copies, and for a moment also without its process.
    """

    facts: bytes
    namespace: bytes
    layout: dict[str, int | str]
    group: str
    rank: int
    ranks: int
    slot_format: str
    slot_bytes: int
    pins: bool


class Attached(msgspec.Struct, array_like=True, tag="attached"):
    """The answer to `Attach`; the arena's descriptor comes with it.

    Attributes:
        session: What every request of this client has to name.
        epoch: Number of this opening of the store, 1 to 2**31 - 1; slots, tickets and leases are of an epoch.
        arena: Random number of the arena; equal for all epochs that lie in the same memory.
        arena_bytes: Length of the arena.
    """

    session: int
    epoch: int
    arena: int
    arena_bytes: int


class Refused(msgspec.Struct, array_like=True, tag="refused"):
    """The answer to an `Attach` that cannot be granted, with the reason for people."""

    reason: str


class Request(msgspec.Struct, array_like=True):
    """What all requests have.

    Attributes:
        session: From `Attached`.
        id: Number that the answer repeats; 0 for none.
    """

    session: int
    id: int


class Ready(Request, tag="ready"):
    """The client has mapped the arena: slots may be promised to it."""


class Ping(Request, tag="ping"):
    """Answered by `Done`."""


class MatchBlocks(Request, tag="match"):
    """`StoreClient.match`: hashes one after the other; a block's cost in seconds, 0 if it is not known."""

    hashes: bytes
    wait: float
    block_cost: float = 0.0
    ask_again: float = 0.0


class Hold(Request, tag="hold"):
    """`StoreClient.hold`, answered by `Done`."""

    lease: int


class Release(Request, tag="release"):
    """`StoreClient.release`; shard -1 for the whole lease."""

    lease: int
    shard: int


class Reserve(Request, tag="reserve"):
    """`StoreClient.reserve_soon`: parent, position and concatenated hashes of each run."""

    runs: list[tuple[bytes, int, bytes]]


class Commit(Request, tag="commit"):
    """`StoreClient.commit`: tickets as u64, one after the other."""

    tickets: bytes
    shard: int


class Abort(Request, tag="abort"):
    """`StoreClient.abort`; shard -1 for all."""

    tickets: bytes
    shard: int


class Stats(Request, tag="stats"):
    """`StoreClient.stats`."""


class Flush(Request, tag="flush"):
    """Wait until what was committed is in the lower tiers, answered by `Done`."""

    timeout: float


class Leave(Request, tag="leave"):
    """A note for other ranks of the same engine, about reservations; answered by `Done`.

    Attributes:
        key: Its number.
        data: What it says.
        readers: The ranks that are going to fetch it.
        tickets: What those of them give up that do not get it.
    """

    key: int
    data: bytes
    readers: list[int]
    tickets: bytes


class Fetch(Request, tag="fetch"):
    """A note that another client of the same engine has left, answered by `Note`."""

    key: int


class Matched(msgspec.Struct, array_like=True, tag="matched"):
    """Slots as u32, one after the other; lease 0 where nothing matched."""

    id: int
    lease: int
    slots: bytes
    sources: dict[str, int]
    ask_again: float = 0.0


class Reserved(msgspec.Struct, array_like=True, tag="reserved"):
    """Tickets as u64, of one run after the other, `NO_TICKET` for none."""

    id: int
    tickets: bytes


class Done(msgspec.Struct, array_like=True, tag="done"):
    """Yes or no."""

    id: int
    ok: bool


class Note(msgspec.Struct, array_like=True, tag="note"):
    """What was left under a number, and its tickets; empty where nothing was, or no longer is."""

    id: int
    data: bytes
    tickets: bytes


class Numbers(msgspec.Struct, array_like=True, tag="numbers"):
    """Counters and gauges."""

    id: int
    values: dict[str, int | float]


AnyRequest = (
    Ready | Ping | MatchBlocks | Hold | Release | Reserve | Commit | Abort | Stats | Flush | Leave | Fetch
)
AnyReply = Matched | Reserved | Done | Numbers | Note

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(AnyRequest)
_replies = msgspec.msgpack.Decoder(AnyReply)
_attach = msgspec.msgpack.Decoder(Attach)
_answers = msgspec.msgpack.Decoder(Attached | Refused)


def encode(message: msgspec.Struct) -> bytes:
    """Encode a message of the desk."""
    return _encoder.encode(message)


def decode_request(data: bytes) -> AnyRequest:
    """Decode what a client sent.

    Raises:
        WireError: It is no request.
    """
    request: AnyRequest = _decode(_requests, data, MAX_MESSAGE_BYTES)
    return request


def decode_reply(data: bytes) -> AnyReply:
    """Decode what the agent sent.

    Raises:
        WireError: It is no reply.
    """
    reply: AnyReply = _decode(_replies, data, MAX_MESSAGE_BYTES)
    return reply


def decode_attach(payload: bytes) -> Attach:
    """Decode the payload of a client's frame.

    Raises:
        WireError: It is no `Attach`.
    """
    attach: Attach = _decode(_attach, payload, MAX_FRAME_BYTES)
    return attach


def decode_answer(payload: bytes) -> Attached | Refused:
    """Decode the payload of the agent's frame.

    Raises:
        WireError: It is neither.
    """
    answer: Attached | Refused = _decode(_answers, payload, MAX_FRAME_BYTES)
    return answer


def frame(message: Attach | Attached | Refused) -> bytes:
    """Encode a message of the door."""
    payload = _encoder.encode(message)
    return _FRAME.pack(_MAGIC, PROTOCOL_VERSION, len(payload)) + payload


def leave_frame() -> bytes:
    """Return the frame, of nobody's version, that makes an agent end if nobody uses it."""
    return _FRAME.pack(_MAGIC, 0, 0)


def frame_length(header: bytes) -> int:
    """Return the length of the payload that follows a frame's header.

    Raises:
        VersionMismatch: The other side speaks another version.
        WireError: It is no header, or the payload is too long.
    """
    magic, version, length = _FRAME.unpack(header)
    if magic != _MAGIC:
        raise WireError("no kvtier agent protocol")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(version)
    if length > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return int(length)


def split_hashes(blob: bytes) -> list[bytes]:
    """Take concatenated hashes apart.

    Raises:
        WireError: No whole number of hashes, or too many.
    """
    if len(blob) % HASH_BYTES or len(blob) > MAX_BLOCKS * HASH_BYTES:
        raise WireError(f"{len(blob)} bytes of hashes")
    # Several times as fast as slicing.
    hashes: list[bytes] = np.frombuffer(blob, f"V{HASH_BYTES}").tolist()
    return hashes


def pack_numbers(numbers: Sequence[int], code: str) -> bytes:
    """Concatenate integers as little-endian "I" (u32) or "Q" (u64)."""
    return struct.pack(f"<{len(numbers)}{code}", *numbers)


def unpack_numbers(blob: bytes, code: str) -> tuple[int, ...]:
    """Take integers apart that `pack_numbers` put together.

    Raises:
        WireError: No whole number of them, or too many.
    """
    count, rest = divmod(len(blob), struct.calcsize(f"<{code}"))
    if rest or count > MAX_BLOCKS:
        raise WireError(f"{len(blob)} bytes of numbers")
    return struct.unpack(f"<{count}{code}", blob)


def bounded_wait(seconds: float) -> float:
    """Return a wait that a client asked for, within the bounds of reason."""
    return min(max(seconds, 0.0), MAX_WAIT_SECONDS) if math.isfinite(seconds) else 0.0


def _decode(decoder: msgspec.msgpack.Decoder[Any], data: bytes, limit: int) -> Any:
    if len(data) > limit:
        raise WireError(f"a message of {len(data)} bytes is over the limit of {limit}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(str(error)) from error
