"""The lease under which one process at a time collects garbage below a prefix.

A lease is a row of objects, `{prefix}/gc/lease-{number}`, each written with `If-None-Match: *`. Whoever wrote
the one with the highest number holds the lease until it is a term old; to renew it is to write the next one.
So neither taking nor renewing ever overwrites anything, and of two that try only one succeeds. Ages are by
the server's clock, and the holder's own view of its lease by its monotonic one: no node's clock matters.
Numbers start from the server's time, in minutes, so that none comes again after the row was empty: a holder
whose machine slept, so that its clock stood still, finds a higher one when it renews.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Callable

from kvtier.errors import TierError
from kvtier.tiers.s3.bucket import Bucket, ListedObject

TERM_SECONDS = 600.0
"""A run that dies keeps others waiting for so long; looking at a large bucket may take minutes."""
_MARGIN_SECONDS = 60.0
"""Others wait so much longer: the listing may come from a server whose clock differs."""
_STEP_SECONDS = 60.0
"""A lease is renewed more seldom, so numbers do not run ahead of the time."""
_NUMBER = re.compile(r"[0-9]{20}")


class NoConditionalPut(TierError):
    """The server does not refuse to overwrite an object, so no lease can be had there."""


class LeaseLost(TierError):
    """Somebody else holds the lease, or it could not be renewed in time."""


class Lease:
    """A lease that this process holds; not thread-safe."""

    def __init__(self, bucket: Bucket, prefix: str, clock: Callable[[], float] = time.monotonic):
        """Prepare; `acquire` takes it.

        Args:
            bucket: Where it lies.
            prefix: The prefix whose garbage it is about.
            clock: Monotonic seconds.
        """
        self._bucket = bucket
        self._root = f"{prefix}/gc/lease-"
        self._clock = clock
        self._number = 0
        self._renewed = 0.0

    def acquire(self) -> bool:
        """Take the lease; False if somebody else holds it.

        Raises:
            NoConditionalPut: The server overwrites objects that it was asked not to.
            AccessDenied: The credentials may not write or delete.
            TierError: The bucket does not answer.
        """
        numbers = self._list()
        newest = max(numbers, default=0)
        if newest and numbers[newest].modified + TERM_SECONDS + _MARGIN_SECONDS > self._bucket.server_time():
            return False
        begun, number = self._clock(), max(newest + 1, int(self._bucket.server_time() // _STEP_SECONDS))
        if not self._write(number):
            return False
        if self._write(number):
            self._bucket.delete(self._key(number))
            raise NoConditionalPut(
                "this server overwrites objects although asked not to (If-None-Match), so two nodes could "
                "collect garbage at once; see that nobody else does, and run `kvtier gc --no-lease`"
            )
        # Whoever was held up between looking and writing may have come late, or in another minute.
        if self._list().keys() - numbers.keys() != {number}:
            self._bucket.delete(self._key(number))
            return False
        self._number, self._renewed = number, begun
        # Where there is nothing to remove, this still tells whether the credentials may delete at all.
        for number in numbers or [0]:
            self._bucket.delete(self._key(number))
        return True

    def keep(self) -> None:
        """Renew the lease if a third of its term is over; to be called before every step.

        Raises:
            LeaseLost: It is not ours any more: stop.
            TierError: The bucket does not answer.
        """
        now = self._clock()
        if now - self._renewed < TERM_SECONDS / 3:
            return
        if now - self._renewed > TERM_SECONDS:
            raise LeaseLost("the lease for collecting garbage ran out")
        number = self._number + 1
        if not self._write(number):
            raise LeaseLost("another node has taken the lease for collecting garbage")
        if max(self._list(), default=0) != number:
            self._bucket.delete(self._key(number))
            raise LeaseLost("another node has taken the lease for collecting garbage")
        self._number, self._renewed = self._number + 1, now
        self._bucket.delete(self._key(self._number - 1))

    def release(self) -> None:
        """Give the lease up, if it is still ours.

        Raises:
            TierError: The bucket does not answer; the lease then runs out by itself.
        """
        if self._clock() - self._renewed < TERM_SECONDS:
            self._bucket.delete(self._key(self._number))

    def _list(self) -> dict[int, ListedObject]:
        return {
            int(item.key[len(self._root) :]): item
            for item in self._bucket.list(self._root)
            if _NUMBER.fullmatch(item.key[len(self._root) :])
        }

    def _write(self, number: int) -> bool:
        body = {"holder": f"{socket.gethostname()}:{os.getpid()}", "seconds": TERM_SECONDS}
        return self._bucket.put(self._key(number), json.dumps(body).encode())

    def _key(self, number: int) -> str:
        return f"{self._root}{number:020d}"


class NoLease:
    """What stands in for a lease where somebody has said that nobody else collects garbage."""

    def keep(self) -> None:
        """Do nothing."""

    def release(self) -> None:
        """Do nothing."""
