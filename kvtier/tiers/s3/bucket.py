"""What the tier asks of a bucket, whichever client does it, and how a bucket can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from kvtier.errors import AccessDenied, CorruptBlock, TierError, TierUnavailable


class ObjectMissing(TierError):
    """The object, or the part of it that was asked for, does not exist."""


class BadReply(CorruptBlock):
    """The reply is not what was asked for: wrong status, range or length, or no S3 reply at all."""


class BucketTimeout(TierUnavailable):
    """The bucket did not answer in time."""


class BucketThrottled(TierUnavailable):
    """The bucket asks for fewer requests."""


class ConnectionLost(TierUnavailable):
    """The connection ended before the reply was complete; another may work."""


_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (BucketTimeout, "timeout"),
    (BucketThrottled, "throttled"),
    (ConnectionLost, "connection"),
    (TierUnavailable, "unavailable"),
    (AccessDenied, "denied"),
    (ObjectMissing, "missing"),
    (BadReply, "bad_reply"),
    (CorruptBlock, "corrupt"),
)


def cause_of(error: Exception) -> str:
    """Name the cause of a failed request, as it stands in statistics."""
    return next((name for kind, name in _CAUSES if isinstance(error, kind)), "unexpected")


@dataclass(frozen=True, slots=True)
class ListedObject:
    """One line of a listing: an object's key and its size in bytes."""

    key: str
    size: int


class Bucket(Protocol):
    """The requests that the tier makes. Thread-safe; a method call is one request unless it says otherwise.

    All methods raise `TierUnavailable` (or a subclass of it), `AccessDenied` or `BadReply`.
    """

    def get_range(self, key: str, offset: int, into: memoryview) -> None:
        """Read `len(into)` bytes of an object from `offset` on straight into `into`.

        A body that breaks off is resumed once, with a request for the rest.

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

    def close(self) -> None:
        """Close the connections."""
        ...
