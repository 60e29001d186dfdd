"""The bucket through boto3: ranged GETs into given buffers, conditional PUTs, and errors made ours."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import botocore.exceptions as boto_errors
import urllib3.exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError

from kvtier import __version__
from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.errors import AccessDenied, KvTierError, TierUnavailable
from kvtier.tiers.s3.absence import absence_told
from kvtier.tiers.s3.bucket import (
    SLOWEST_BYTES_PER_SECOND,
    BadReply,
    BucketTimeout,
    ConnectionLost,
    ExpiredCredentials,
    ListedObject,
    ObjectMissing,
    Parts,
    RangeMissing,
)
from kvtier.tiers.s3.conditional import ConditionalPut
from kvtier.tiers.s3.listing import Page, list_in_order, list_sorted
from kvtier.tiers.s3.replies import content_range, error_of, seconds_of
from kvtier.tiers.s3.retries import Retries
from kvtier.tiers.s3.signing import open_session

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

T = TypeVar("T")

_CHUNK_BYTES = 128 << 10
"""A body is read in pieces of this size, with a look at its deadline after each; smaller ones cost CPU."""
_MD5_OPERATIONS = ("DeleteObjects", "PutBucketLifecycleConfiguration")
"""Older servers want Content-MD5 here and take no newer checksum instead."""
_BOTO_ERRORS = (
    boto_errors.BotoCoreError,
    boto_errors.ClientError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
)
_PARSER_ERRORS = (ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError)
"""What botocore's parsers raise for sizes and times that are none."""


class BotoBucket:
    """A `Bucket` on one boto3 client, which is made on first use: construction does no I/O.

    GETs are retried as `Retries` says; whoever puts or lists knows better whether to wait.
    """

    def __init__(self, config: S3Config, counters: Counters):
        """Prepare a bucket; `counters` gets the requests and bytes of every kind."""
        self._config = config
        self._counters = counters
        self._lock = threading.Lock()
        self._client: S3Client | None = None
        self._retries = Retries()
        self.put_condition = ConditionalPut(self._put)
        self._time_told = (time.time(), time.monotonic())

    def get_range(self, key: str, offset: int, into: memoryview) -> None:
        """See `Bucket.get_range`."""
        self.get_parts(key, offset, len(into), iter([into]))

    def get_parts(self, key: str, offset: int, length: int, parts: Iterator[memoryview]) -> None:
        """See `Bucket.get_parts`."""
        deadline = time.monotonic() + self._config.read_timeout + length / SLOWEST_BYTES_PER_SECOND
        into = Parts(parts, length)
        with absence_told(key, self.list):
            attempts = self._retries.receive(
                lambda: self._get_left(key, offset + into.done, into, deadline),
                into,
                lambda: deadline - time.monotonic(),
            )
        self._counters.add("retries", attempts)

    def get_tail(self, key: str, length: int) -> tuple[bytes, int]:
        """See `Bucket.get_tail`."""
        with absence_told(key, self.list):
            try:
                return self._get_tail(key, length, f"bytes=-{length}")
            except RangeMissing:
                # Some servers have no last 1,000 bytes of an object of 900.
                return self._get_tail(key, length, f"bytes=0-{length - 1}")

    def put(self, key: str, body: bytes) -> bool:
        """See `Bucket.put`."""
        return self.put_condition(key, body)

    def list(self, prefix: str, start_after: str = "") -> Iterator[ListedObject]:
        """See `Bucket.list`."""
        listed = list_sorted if self._config.express else list_in_order
        return listed(self._get_page, prefix, start_after)

    def delete(self, key: str) -> None:
        """See `Bucket.delete`."""
        self._counters.add("delete_requests")
        try:
            self._ask(
                f"DELETE {key}", lambda client: client.delete_object(Bucket=self._config.bucket, Key=key)
            )
        except ObjectMissing:
            return

    def server_time(self) -> float:
        """See `Bucket.server_time`."""
        told, at = self._time_told
        return told + time.monotonic() - at

    def note_time(self, date: str) -> None:
        """Take over the server's time from the Date header of a listing that has just been received."""
        moment = seconds_of(date)
        if moment is not None:
            self._time_told = (moment, time.monotonic())

    def place(self) -> tuple[str, str]:
        """Return the endpoint's URL and the region that botocore has found for this configuration.

        Raises:
            AccessDenied: The configuration or the environment is contradictory.
        """
        meta = self._connect().meta
        return meta.endpoint_url, meta.region_name

    def create_session(self) -> Mapping[str, Any]:
        """Make a session with a directory bucket and return its credentials.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        reply: Any = self._ask(
            "CreateSession", lambda client: client.create_session(Bucket=self._config.bucket)
        )
        made = reply.get("Credentials", {})
        missing = {"AccessKeyId", "SecretAccessKey", "SessionToken", "Expiration"} - made.keys()
        if missing:
            raise BadReply(f"CreateSession: a session without {', '.join(sorted(missing))}")
        return made  # type: ignore[no-any-return]

    def close(self) -> None:
        """See `Bucket.close`."""
        with self._lock:
            if self._client is not None:
                self._client.close()

    def _connect(self) -> S3Client:
        # Making a client reads data files for some hundred milliseconds; the lock keeps it to one.
        with self._lock:
            if self._client is None:
                self._client = make_client(self._config)
            return self._client

    def _get_page(self, prefix: str, more: Mapping[str, str]) -> Page:
        self._counters.add("list_requests")
        request: Any = {"Bucket": self._config.bucket, "Prefix": prefix, **more}
        reply: Any = self._ask(f"LIST {prefix}", lambda client: client.list_objects_v2(**request))
        self.note_time(reply["ResponseMetadata"]["HTTPHeaders"].get("date", ""))
        try:
            items = [
                ListedObject(item["Key"], item["Size"], item["LastModified"].timestamp())
                for item in reply.get("Contents", [])
            ]
            return Page(items, reply["NextContinuationToken"] if reply["IsTruncated"] else None)
        except KeyError as error:
            raise BadReply(f"LIST {prefix}: not a listing, it lacks {error}") from error

    def _ask(self, what: str, request: Callable[[S3Client], T]) -> T:
        """Make a request; where its credentials have expired, once more with those that are found now."""
        client = self._connect()
        try:
            with translated(what):
                return request(client)
        except ExpiredCredentials:
            with self._lock:
                # The old one is not closed: other threads may be using it.
                if self._client is client:
                    self._client = None
        with translated(what):
            return request(self._connect())

    def _get_tail(self, key: str, length: int, byte_range: str) -> tuple[bytes, int]:
        with self._get(key, byte_range) as (reply, total):
            start = max(0, total - length)
            if _content_range(reply) != (start, total - 1, total):
                raise BadReply(f"{key}: asked for the last {length} bytes, got {reply.get('ContentRange')}")
            data = bytearray(total - start)
            into = Parts(iter([memoryview(data)]), len(data))
            self._receive(key, reply, into, time.monotonic() + self._config.read_timeout)
        return bytes(data), total

    def _get_left(self, key: str, offset: int, into: Parts, deadline: float) -> None:
        """Make one GET for what is left."""
        end = offset + into.left - 1
        with self._get(key, f"bytes={offset}-{end}") as (reply, _):
            if _content_range(reply)[:2] != (offset, end):
                raise BadReply(f"{key}: asked for bytes {offset}-{end}, got {reply.get('ContentRange')}")
            self._receive(key, reply, into, deadline)

    @contextlib.contextmanager
    def _get(self, key: str, byte_range: str) -> Iterator[tuple[GetObjectOutputTypeDef, int]]:
        """Make a ranged GET, give the reply and the object's size, and close the body afterwards."""
        self._counters.add("get_requests")
        reply = self._ask(
            f"GET {key}",
            lambda client: client.get_object(Bucket=self._config.bucket, Key=key, Range=byte_range),
        )
        try:
            # Some servers (rclone's) send a part with status 200: what counts is that they say which part.
            if not reply.get("ContentRange") and reply["ResponseMetadata"]["HTTPStatusCode"] != 206:
                raise BadReply(f"{key}: the server ignored the range {byte_range}")
            yield reply, _content_range(reply)[2]
        finally:
            reply["Body"].close()

    def _receive(self, key: str, reply: GetObjectOutputTypeDef, into: Parts, deadline: float) -> None:
        due = into.left
        if reply.get("ContentLength") not in (None, due):
            raise BadReply(f"{key}: {reply.get('ContentLength')} bytes announced where {due} were due")
        body: Any = reply["Body"]
        while into.left:
            with translated(f"GET {key}"):
                count = body.readinto(into.room()[:_CHUNK_BYTES])
            if count == 0:
                raise ConnectionLost(f"GET {key}: the body ended {into.left} bytes early")
            if time.monotonic() > deadline:
                raise BucketTimeout(f"GET {key}: {into.left} of {due} bytes did not come in time")
            self._counters.add("get_bytes", count)
            into.advance(count)

    def _put(self, key: str, body: bytes, conditional: bool) -> None:
        request: Any = {"Bucket": self._config.bucket, "Key": key, "Body": body}
        if conditional:
            request["IfNoneMatch"] = "*"
        if self._config.encryption:
            request["ServerSideEncryption"] = self._config.encryption
        if self._config.kms_key:
            request["SSEKMSKeyId"] = self._config.kms_key
        self._counters.add("put_requests")
        reply = self._ask(f"PUT {key}", lambda client: client.put_object(**request))
        if "ETag" not in reply:
            raise BadReply(f"PUT {key}: not the reply of an S3 server")
        self._counters.add("put_bytes", len(body))


def _content_range(reply: GetObjectOutputTypeDef) -> tuple[int, int, int]:
    found = content_range(reply.get("ContentRange", ""))
    if found is None:
        raise BadReply(f"no usable Content-Range: {reply.get('ContentRange')}")
    return found


def make_client(config: S3Config) -> S3Client:
    """Return a boto3 client for this bucket, retrying nothing by itself; takes some hundred milliseconds."""
    with translated("connecting"):
        client = open_session(config).client(
            "s3",
            endpoint_url=config.endpoint,
            region_name=config.region or ("us-east-1" if config.endpoint else None),
            config=Config(
                # botocore itself knows how a directory bucket's requests are signed.
                signature_version=None if config.express else "s3v4",
                s3={"addressing_style": _addressing_style(config)},
                connect_timeout=config.connect_timeout,
                read_timeout=config.read_timeout,
                retries={"total_max_attempts": 1, "mode": "standard"},
                # Reads, uploads, index: none of them waits for a connection.
                max_pool_connections=config.concurrency + 32,
                # Some servers send the whole object's checksum with a range; blocks carry their own.
                request_checksum_calculation="when_supported" if config.checksums else "when_required",
                response_checksum_validation="when_required",
                tcp_keepalive=True,
                user_agent_extra=f"kvtier/{__version__}",
            ),
        )
    for operation in _MD5_OPERATIONS:
        client.meta.events.register(f"before-call.s3.{operation}", _add_content_md5)
    return client


def _addressing_style(config: S3Config) -> Literal["path", "virtual", "auto"]:
    if config.uses_path_style and not config.express:
        return "path"
    # What botocore chooses by itself is right on AWS; elsewhere it is the path, whatever was configured.
    return "auto" if config.endpoint is None or config.express or "." in config.bucket else "virtual"


def _add_content_md5(params: dict[str, Any], **_: object) -> None:
    body = params["body"]
    digest = hashlib.md5(body.encode() if isinstance(body, str) else body, usedforsecurity=False).digest()
    params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn botocore's and urllib3's exceptions into ours, with what the user can do."""
    try:
        yield
    except _BOTO_ERRORS as error:
        raise _translate(what, error) from error
    except _PARSER_ERRORS as error:
        raise BadReply(f"{what}: a reply that makes no sense: {error}") from error


def _translate(what: str, error: Exception) -> KvTierError:
    if isinstance(error, boto_errors.ClientError):
        return _translate_reply(what, error)
    text = f"{what}: {error}"
    if isinstance(
        error,
        boto_errors.ReadTimeoutError | boto_errors.ConnectTimeoutError | urllib3.exceptions.TimeoutError,
    ):
        return BucketTimeout(text)
    if isinstance(
        error,
        boto_errors.ConnectionClosedError
        | boto_errors.ResponseStreamingError
        | boto_errors.IncompleteReadError
        | urllib3.exceptions.ProtocolError,
    ):
        return ConnectionLost(text)
    if isinstance(error, ResponseParserError):
        return BadReply(text)
    if isinstance(error, boto_errors.NoCredentialsError | boto_errors.PartialCredentialsError):
        return AccessDenied(f"{text}; set access_key_env and secret_key_env, or the usual AWS credentials")
    if isinstance(error, boto_errors.ParamValidationError | boto_errors.UnauthorizedSSOTokenError):
        return AccessDenied(text)
    return TierUnavailable(text)


def _translate_reply(what: str, error: boto_errors.ClientError) -> KvTierError:
    reply, detail = error.response.get("ResponseMetadata", {}), error.response.get("Error", {})
    return error_of(
        what,
        reply.get("HTTPStatusCode", 0),
        detail.get("Code", ""),
        detail.get("Message", ""),
        reply.get("HTTPHeaders", {}).get("retry-after"),
        reply.get("HTTPHeaders", {}).get("date"),
    )
