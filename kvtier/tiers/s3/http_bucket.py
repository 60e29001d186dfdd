"""The bucket through our own HTTP client; boto3 finds out where it is, and makes sessions."""

from __future__ import annotations

import base64
import contextlib
import time
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.errors import AccessDenied, KvTierError, TierUnavailable
from kvtier.tiers.s3.absence import absence_told, meaning
from kvtier.tiers.s3.aside import Aside
from kvtier.tiers.s3.boto_bucket import BotoBucket
from kvtier.tiers.s3.bucket import (
    SLOWEST_BYTES_PER_SECOND,
    BadReply,
    BucketTimeout,
    ExpiredCredentials,
    ListedObject,
    ObjectMissing,
    Parts,
    RangeMissing,
)
from kvtier.tiers.s3.conditional import ConditionalPut
from kvtier.tiers.s3.express import Sessions, express_host
from kvtier.tiers.s3.hedge import Pace
from kvtier.tiers.s3.http_connection import Body, Deadline, Origin, Stalled
from kvtier.tiers.s3.http_exchange import Address, Exchange, Reply, address_of
from kvtier.tiers.s3.http_wire import ReplyHead
from kvtier.tiers.s3.key_ring import KeyRing
from kvtier.tiers.s3.listing import MAX_PAGE_BYTES, Page, list_in_order, list_sorted, page_query, parse_page
from kvtier.tiers.s3.replies import content_range, error_of, read_error
from kvtier.tiers.s3.retries import Retries
from kvtier.tiers.s3.signing import Signer, open_session
from kvtier.tiers.s3.waiting import run, wait_for

_LISTINGS = 2
"""Listings that tell what refusals mean, at once."""
_MAX_ERROR_BYTES = 64 << 10


class HttpBucket:
    """A `Bucket` whose requests go over connections of our own.

    boto3 finds the endpoint, the region and the credentials, so that both mean the same bucket.
    What is retried is in `Retries`; besides, stale connections and expired credentials are replaced once.
    """

    def __init__(self, config: S3Config, counters: Counters):
        """Prepare a bucket; `counters` gets the requests and bytes of every kind. Does no I/O."""
        self._config = config
        self._counters = counters
        self._control = BotoBucket(config, counters)
        signer = Signer(KeyRing(self._open_keys), express=config.express)
        self._exchange = Exchange(config, counters, self._locate, signer)
        self._aside = Aside("s3-list", _LISTINGS)
        self._retries = Retries()
        self.put_condition = ConditionalPut(self._put)

    def get_range(self, key: str, offset: int, into: memoryview) -> None:
        """See `Bucket.get_range`."""
        self.get_parts(key, offset, len(into), iter([into]))

    def get_parts(self, key: str, offset: int, length: int, parts: Iterator[memoryview]) -> None:
        """See `Bucket.get_parts`."""
        run(self.fetch_parts(key, offset, length, parts))

    async def fetch_parts(self, key: str, offset: int, length: int, parts: Iterator[memoryview]) -> None:
        """See `FetchesInTurns.fetch_parts`."""
        deadline = self._deadline(length)
        into = Parts(parts, length)
        attempt = 0
        while True:
            try:
                await self._get(key, offset + into.done, into, deadline)
            except TierUnavailable as error:
                await wait_for((), self._retries.pause(error, attempt, into, deadline.left()))
                attempt += 1
            except AccessDenied as refusal:
                raise await self._meaning(key, refusal, deadline) from refusal.__cause__
            else:
                break
        self._retries.succeeded()
        self._counters.add("retries", attempt)

    def get_tail(self, key: str, length: int) -> tuple[bytes, int]:
        """See `Bucket.get_tail`."""
        with absence_told(key, self.list):
            try:
                return run(self._get_tail(key, length, f"bytes=-{length}"))
            except RangeMissing:
                # Some servers have no last 1,000 bytes of an object of 900.
                return run(self._get_tail(key, length, f"bytes=0-{length - 1}"))

    def put(self, key: str, body: bytes) -> bool:
        """See `Bucket.put`."""
        return self.put_condition(key, body)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ListedObject]:
        """See `Bucket.list`."""
        listed = list_sorted if self._config.express else list_in_order
        return listed(lambda prefix, more: run(self._get_page(prefix, more)), prefix, start_after)

    def delete(self, key: str) -> None:
        """See `Bucket.delete`."""
        self._counters.add("delete_requests")
        with contextlib.suppress(ObjectMissing):
            run(self._delete(key))

    def server_time(self) -> float:
        """See `Bucket.server_time`."""
        return self._control.server_time()

    def close(self) -> None:
        """See `Bucket.close`."""
        self._exchange.close()
        self._aside.close()
        self._control.close()

    def _open_keys(self) -> Any:
        if self._config.express:
            return Sessions(self._control.create_session)
        return open_session(self._config).get_credentials()

    def _locate(self) -> Address:
        endpoint, region = self._control.place()
        if self._config.express and self._config.endpoint is None:
            return Address(Origin(True, express_host(self._config.bucket, region), 443), "", region)
        return address_of(endpoint, self._config.bucket, self._config.uses_path_style, region)

    def _deadline(self, length: int) -> Deadline:
        idle = self._config.read_timeout
        return Deadline(self._config.connect_timeout + idle + length / SLOWEST_BYTES_PER_SECOND, idle)

    async def _meaning(self, key: str, refusal: AccessDenied, deadline: Deadline) -> KvTierError:
        """Return what a refusal means; the listing that tells it is made beside the thread that reads."""
        try:
            look = partial(meaning, key, self.list, refusal)
            return await self._aside.call(look, max(0.0, deadline.left()), "the listing that tells why")
        except TierUnavailable:
            return refusal

    async def _get_tail(self, key: str, length: int, byte_range: str) -> tuple[bytes, int]:
        self._counters.add("get_requests")
        with await self._request("GET", key, {"Range": byte_range}, b"", self._deadline(length)) as (
            head,
            body,
        ):
            start, end, total = _content_range(key, head)
            if (start, end) != (max(0, total - length), total - 1):
                raise BadReply(f"GET {key}: asked for the last {length} bytes, got {start}-{end}/{total}")
            data = bytearray(end + 1 - start)
            await self._receive(key, head, body, Parts(iter([memoryview(data)]), len(data)))
        return bytes(data), total

    async def _get_page(self, prefix: str, more: Mapping[str, str]) -> Page:
        self._counters.add("list_requests")
        query, deadline = page_query(prefix, more), self._deadline(MAX_PAGE_BYTES)
        with await self._request("GET", "", {}, b"", deadline, query, f"LIST {prefix}") as (head, body):
            page = await body.read(MAX_PAGE_BYTES)
            if len(page) >= MAX_PAGE_BYTES:
                raise BadReply(f"LIST {prefix}: a page without end")
        self._control.note_time(head.headers.get("date", ""))
        return parse_page(page)

    async def _delete(self, key: str) -> None:
        with await self._request("DELETE", key, {}, b"", self._deadline(0)) as (_, body):
            await body.read(_MAX_ERROR_BYTES)

    async def _get(self, key: str, offset: int, into: Parts, deadline: Deadline) -> None:
        """Make one GET for what is left, and another one for the rest of a body that stalls."""
        start = offset - into.done
        end = offset + into.left - 1
        while into.left:
            self._counters.add("get_requests")
            offset = start + into.done
            headers = {"Range": f"bytes={offset}-{end}"}
            with await self._request("GET", key, headers, b"", deadline) as (head, body):
                got = _content_range(key, head)
                if got[:2] != (offset, end):
                    raise BadReply(f"GET {key}: asked for bytes {offset}-{end}, got {got[0]}-{got[1]}")
                await self._receive(key, head, body, into, resumable=True)

    async def _receive(
        self, key: str, head: ReplyHead, body: Body, into: Parts, *, resumable: bool = False
    ) -> None:
        """Receive a body; a `resumable` one only in part where it stalls and another request is granted."""
        due, before = into.left, into.done
        if head.length not in (None, due):
            raise BadReply(f"GET {key}: {head.length} bytes announced where {due} were due")
        hedges = self._exchange.hedges
        pace = Pace(hedges.patience())
        try:
            while into.left:
                slow = await self._receive_some(key, body, into, pace)
                if slow and resumable and into.left and hedges.take():
                    self._counters.add("stalled_bodies")
                    return
        finally:
            self._counters.add("get_bytes", into.done - before)
        if not body.ended and await body.readinto(memoryview(bytearray(1))):
            raise BadReply(f"GET {key}: more than the {due} bytes that were due")

    async def _receive_some(self, key: str, body: Body, into: Parts, pace: Pace) -> bool:
        """Receive what comes next, if it comes soon; say whether the body is slow."""
        room, start = into.room(), time.monotonic()
        try:
            count = await body.readinto(room, pace.left())
        except Stalled:
            count = None
        slow = pace.is_slow(time.monotonic() - start, count or 0)
        if count == 0:
            raise BadReply(f"GET {key}: {into.left} bytes less than were due")
        if pace.silent >= self._config.read_timeout:
            raise BucketTimeout(f"GET {key}: {into.left} bytes did not come in time")
        if count:
            into.advance(count)
        return slow

    def _put(self, key: str, body: bytes, conditional: bool) -> None:
        run(self._send(key, body, conditional))

    async def _send(self, key: str, body: bytes, conditional: bool) -> None:
        self._counters.add("put_requests")
        headers = put_headers(self._config, body)
        if conditional:
            headers["If-None-Match"] = "*"
        with await self._request("PUT", key, headers, body, self._deadline(len(body))) as (head, reply):
            await reply.read(_MAX_ERROR_BYTES)
            if "etag" not in head.headers:
                raise BadReply(f"PUT {key}: not the reply of an S3 server")
        self._counters.add("put_bytes", len(body))

    async def _request(
        self,
        method: str,
        key: str,
        headers: dict[str, str],
        body: bytes,
        deadline: Deadline,
        query: str = "",
        what: str = "",
    ) -> Reply:
        """Make a request and give its reply if it is a success; expired credentials are renewed once.

        Some servers (rclone's) send a part with status 200: what counts is that they say which part it is.
        """
        what = what or f"{method} {key}"
        for last_try in (False, True):
            reply = await self._exchange.request(method, key, headers, body, deadline, query)
            head, ranged = reply.head, "Range" in headers
            if head.status == 206 or (head.status < 300 and (not ranged or "content-range" in head.headers)):
                return reply
            with reply:
                if head.status < 300:
                    raise BadReply(f"{what}: the server ignored the range {headers.get('Range')}")
                error = error_of(
                    what,
                    head.status,
                    *read_error(await reply.body.read(_MAX_ERROR_BYTES)),
                    head.headers.get("retry-after"),
                    head.headers.get("date"),
                )
            if last_try or not isinstance(error, ExpiredCredentials):
                raise error
            self._exchange.renew_credentials()
        raise AssertionError("unreachable")


def put_headers(config: S3Config, body: bytes) -> dict[str, str]:
    """Return what the configuration adds to a PUT: encryption and a checksum."""
    headers = {}
    if config.encryption:
        headers["x-amz-server-side-encryption"] = config.encryption
    if config.kms_key:
        headers["x-amz-server-side-encryption-aws-kms-key-id"] = config.kms_key
    if config.checksums:
        headers["x-amz-checksum-crc32"] = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()
    return headers


def _content_range(key: str, head: ReplyHead) -> tuple[int, int, int]:
    told = head.headers.get("content-range", "")
    found = content_range(told)
    if found is None:
        raise BadReply(f"GET {key}: no usable Content-Range: {head.headers.get('content-range')!r}")
    start, end, total = found
    if not start <= end < total:
        raise BadReply(f"GET {key}: an impossible Content-Range: {told!r}")
    return found
