"""Finding out what a bucket lets kvtier do: a real request for each permission, on one small object."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from kvtier.errors import CorruptBlock, KvTierError, TierError
from kvtier.tiers.s3.bucket import Bucket, ObjectMissing

_BODY_BYTES = 4096
_PART = (1000, 2000)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: The permission ("s3:PutObject") or the ability ("conditional PUT").
        purpose: What kvtier needs it for.
        ok: Whether it worked.
        needed: Whether kvtier cannot do without.
        detail: What went wrong and what to do, or what the answer means.
    """

    name: str
    purpose: str
    ok: bool
    needed: bool
    detail: str


def probe(bucket: Bucket, prefix: str) -> list[Check]:
    """Try everything that kvtier does with a bucket; leaves nothing behind where it may delete.

    Args:
        bucket: The bucket.
        prefix: Of all keys; the object that is written lies in `{prefix}/probe/`.

    Returns:
        What was tried, in order; what depends on something that failed is left out.
    """
    key, body = f"{prefix}/probe/{secrets.token_hex(16)}", secrets.token_bytes(_BODY_BYTES)
    checks = [
        _check("s3:ListBucket", "find index and packs", True, lambda: _list(bucket, f"{prefix}/")),
        _check("s3:PutObject", "store blocks", True, lambda: _put(bucket, key, body)),
    ]
    if checks[-1].ok:
        checks += [
            _check("s3:GetObject", "load blocks", True, lambda: _get_whole(bucket, key, body)),
            _check("ranged GET", "load part of a pack", True, lambda: _get_part(bucket, key, body)),
            _check_condition(bucket, key, body),
            _check(
                "s3:DeleteObject", "compact the index, collect garbage", False, lambda: bucket.delete(key)
            ),
        ]
    return checks


def _check(name: str, purpose: str, needed: bool, attempt: Callable[[], object]) -> Check:
    try:
        attempt()
    except KvTierError as error:
        return Check(name, purpose, False, needed, str(error))
    return Check(name, purpose, True, needed, "")


def _list(bucket: Bucket, prefix: str) -> None:
    next(bucket.list(prefix), None)


def _put(bucket: Bucket, key: str, body: bytes) -> None:
    if not bucket.put(key, body):
        raise TierError(f"{key}: the server says that a random new key exists already")


def _get_whole(bucket: Bucket, key: str, body: bytes) -> None:
    data, size = bucket.get_tail(key, 2 * len(body))
    if (data, size) != (body, len(body)):
        raise CorruptBlock(f"{key}: what came back is not what was written")


def _get_part(bucket: Bucket, key: str, body: bytes) -> None:
    start, end = _PART
    part = bytearray(end - start)
    bucket.get_range(key, start, memoryview(part))
    if part != body[start:end]:
        raise CorruptBlock(f"{key}: another part came back than was asked for")


def _check_condition(bucket: Bucket, key: str, body: bytes) -> Check:
    """Write the same key again: a server that knows the condition refuses, and keeps the first object."""
    name, purpose = "conditional PUT", "let replicas share packs, one node compact"
    without = (
        "not supported: replicas that store the same blocks write them twice, and several nodes may do the "
        "same chores at once; nothing breaks"
    )
    try:
        refused = not bucket.put(key, body[::-1])
        kept = bucket.get_tail(key, len(body))[0] == body
    except ObjectMissing:
        return Check(name, purpose, False, False, without)
    except KvTierError as error:
        return Check(name, purpose, False, False, str(error))
    return (
        Check(name, purpose, True, False, "")
        if refused and kept
        else Check(name, purpose, False, False, without)
    )
