"""What the tier asks of a bucket, whichever client does it, and how a bucket can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvtier.errors import AccessDenied, CorruptBlock, TierError, TierFull, TierUnavailable
from kvtier.tiers.s3.waiting import Request


class ObjectMissing(TierError):
    """The object, or the part of it that was asked for, does not exist."""


class RangeMissing(ObjectMissing):
    """The object is there, or another one than expected: it has no such part."""


class BadReply(CorruptBlock):
    """The reply is not what was asked for: wrong status, range or length, or no S3 reply at all."""


class BucketTimeout(TierUnavailable):
    """The bucket did not answer in time."""


class BucketThrottled(TierUnavailable):
    """The bucket asks for fewer requests.

    Attributes:
        retry_after: Seconds that it asks to be left alone for; None if it does not say.
    """

    def __init__(self, message: str, retry_after: float | None = None):
        """Say so."""
        super().__init__(message)
        self.retry_after = retry_after


class ExpiredCredentials(AccessDenied):
    """The credentials were right once; looked up anew, they may be right again."""


class ConnectionLost(TierUnavailable):
    """The connection ended before the reply was complete; another may work."""


_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (BucketTimeout, "timeout"),
    (BucketThrottled, "throttled"),
    (ConnectionLost, "connection"),
    (TierUnavailable, "unavailable"),
    (TierFull, "full"),
    (AccessDenied, "denied"),
    (ObjectMissing, "missing"),
    (BadReply, "bad_reply"),
    (CorruptBlock, "corrupt"),
)


SLOWEST_BYTES_PER_SECOND = 512 << 10
"""A body that arrives or leaves more slowly is a time-out, though its connection never rests."""


class Parts:
    """Buffers that a body fills one after the other. Not thread-safe.

    The iterator that gives them is asked for the next one when the one before is full, and once more at the
    end: a generator may use each part there, while the rest of the body is still on its way.
    """

    def __init__(self, parts: Iterator[memoryview], length: int):
        """Prepare to receive `length` bytes, which is what all parts together hold."""
        self._parts = parts
        self._part = memoryview(b"")
        self._filled = 0
        self.left = length
        """Bytes that are still to come."""
        self.done = 0
        """Bytes that have come."""

    def room(self) -> memoryview:
        """Return where the next bytes belong; at least one byte long unless all have come."""
        while self._filled == len(self._part) and self.left:
            self._part, self._filled = next(self._parts), 0
        return self._part[self._filled :]

    def advance(self, count: int) -> None:
        """Say that `count` bytes have been written to the front of `room()`."""
        self._filled += count
        self.left -= count
        self.done += count
        if self.left == 0:
            # The generator comes to its end.
            next(self._parts, None)


def cause_of(error: Exception) -> str:
    """Name the cause of a failed request, as it stands in statistics."""
    return next((name for kind, name in _CAUSES if isinstance(error, kind)), "unexpected")


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One line of a listing.

    Attributes:
        key: The object's key.
        size: Its bytes.
        modified: When it was written, in seconds since 1970 by the server's clock.
    """

    key: str
    size: int
    modified: float = 0.0


class Bucket(Protocol):
    """The requests that the tier makes. Thread-safe; a method call is one request unless it says otherwise.

    All methods raise `TierUnavailable` (or a subclass of it), `AccessDenied` or `BadReply`.
    """

    def get_range(self, key: str, offset: int, into: memoryview) -> None:
        """Read `len(into)` bytes of an object from `offset` on straight into `into`.

        What fails for a reason that may pass is asked for again, of a broken-off body only the rest.

        Raises:
            ObjectMissing: No such object, or it is shorter.
        """
        ...

    def get_parts(self, key: str, offset: int, length: int, parts: Iterator[memoryview]) -> None:
        """Read `length` bytes as `get_range` does, into one buffer after the other.

        Args:
            key: The object.
            offset: First byte.
            length: Bytes of all parts together.
            parts: Asked for the next buffer when the one before is full, and once more at the end.

        Raises:
            ObjectMissing: No such object, or it is shorter.
        """
        ...

    def get_tail(self, key: str, length: int) -> tuple[bytes, int]:
        """Read the last `length` bytes of an object, or all of it if it is shorter.

        Returns:
            The bytes, and the size of the object.

        Raises:
            ObjectMissing: No such object.
        """
        ...

    def put(self, key: str, body: bytes) -> bool:
        """Write an object unless it exists, where the server can tell; otherwise overwrite it.

        Returns:
            False if the object is there already, or just being written by somebody else.
        """
        ...

    def list(self, prefix: str, start_after: str = "") -> Iterator[ListedObject]:
        """List the objects below `prefix` with keys after `start_after`, in order; a request per 1,000."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object; one that is gone already is fine."""
        ...

    def server_time(self) -> float:
        """Return the time in seconds since 1970 by the server's clock, or this machine's before any listing.

        No request is made: the latest listing said it, and the time since then is counted here.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@runtime_checkable
class FetchesInTurns(Protocol):
    """A bucket of which one thread can read many parts at once."""

    def fetch_parts(self, key: str, offset: int, length: int, parts: Iterator[memoryview]) -> Request[None]:
        """Return what does the same as `Bucket.get_parts`, and waits by `wait_for` alone."""
        ...
