"""Telling an object that is not there from one that may not be read.

AWS answers 403 for objects that do not exist, unless the credentials may list the bucket
(https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html, Permissions); that they may list what is
below a prefix, which is all that a careful policy lets them, may not count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from kvtier.errors import AccessDenied, KvTierError
from kvtier.tiers.s3.bucket import ListedObject, ObjectMissing

Listing = Callable[[str], Iterator[ListedObject]]
"""Lists what begins with a prefix."""


@contextlib.contextmanager
def absence_told(key: str, listing: Listing) -> Iterator[None]:
    """Turn a refusal to read an object into `ObjectMissing` where a listing says that there is none.

    Costs a LIST request for each refusal; refusals open the breaker at once, so they are few.

    Args:
        key: The object that is read.
        listing: Lists what begins with a prefix.
    """
    try:
        yield
    except AccessDenied as refusal:
        raise meaning(key, listing, refusal) from refusal.__cause__


def meaning(key: str, listing: Listing, refusal: AccessDenied) -> KvTierError:
    """Return what a refusal to read an object means: itself, or `ObjectMissing`; makes the LIST request."""
    try:
        found = next(listing(key), None)
    except KvTierError:
        return refusal
    if found is not None and found.key == key:
        return refusal
    return ObjectMissing(f"{key}: not listed; the server's answer was: {refusal}")
