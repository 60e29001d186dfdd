"""Settings that change what requests look like: addressing, encryption, checksums, S3 Express."""

from __future__ import annotations

import base64
import datetime
import socket
import zlib
from typing import Any

import pytest

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.tiers.s3.bucket import BadReply, Bucket
from kvtier.tiers.s3.express import Sessions, express_host
from kvtier.tiers.s3.open_bucket import open_bucket
from tests.http_support import DATA, Serve, read, reply, serve, serving
from tests.sigv4 import assert_signed

__all__ = ["serve"]

TRANSPORTS = ("http", "boto3")
LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


def bucket_of(endpoint: str, **settings: Any) -> Bucket:
    keys = {"access_key_env": "KVTIER_TEST_KEY", "secret_key_env": "KVTIER_TEST_KEY"}
    config = {"bucket": "bucket", "endpoint": endpoint, "region": "us-east-1", **keys, **settings}
    return open_bucket(S3Config(**config), Counters())


def headers_of(head: str) -> dict[str, str]:
    lines = (line.partition(":") for line in head.split("\r\n")[1:])
    return {name.lower(): value.strip() for name, _, value in lines}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_bucket_in_the_host_name(serve: Serve, monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *more, **named: resolve("127.0.0.1", *more, **named)
    )
    server = serve(lambda head: reply(200, LISTING) if "list-type" in head else serving(head))
    bucket = bucket_of(f"http://s3.test:{server.port}", path_style=False, transport=transport)
    assert read(bucket) == DATA[100:50_100]
    assert list(bucket.list("some/")) == []
    get, listing = server.requests
    assert get.startswith("GET /some%20key/%21x ")
    assert listing.startswith("GET /?")
    assert "list-type=2" in listing
    for head in server.requests:
        assert headers_of(head)["host"] == f"bucket.s3.test:{server.port}"
    bucket.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, {}),
        ({"encryption": "AES256"}, {"x-amz-server-side-encryption": "AES256"}),
        (
            {"encryption": "aws:kms", "kms_key": "alias/kv"},
            {
                "x-amz-server-side-encryption": "aws:kms",
                "x-amz-server-side-encryption-aws-kms-key-id": "alias/kv",
            },
        ),
        (
            {"checksums": True},
            {"x-amz-checksum-crc32": base64.b64encode(zlib.crc32(DATA).to_bytes(4, "big")).decode()},
        ),
    ],
)
def test_writes_say_how_they_are_kept(
    serve: Serve, transport: str, settings: dict[str, Any], wanted: dict[str, str]
) -> None:
    server = serve(lambda head: reply(200, ETag='"1"'))
    bucket = bucket_of(server.endpoint, transport=transport, **settings)
    assert bucket.put("a/b", DATA)
    headers = headers_of(server.requests[0])
    shown = {
        name: value
        for name, value in headers.items()
        if "encryption" in name or name in ("x-amz-checksum-crc32", "x-amz-trailer")
    }
    assert shown == wanted
    assert all(name in headers["authorization"] for name in wanted), "signed"
    assert server.bodies == [DATA]
    bucket.close()


class FakeExpress:
    """Answers as a directory bucket does: session credentials, no order, no StartAfter, whole folders only.

    Signatures are checked by the published algorithm. Whether AWS itself takes the requests cannot be tried
    here; what they must look like is in https://docs.aws.amazon.com/AmazonS3/latest/API/API_CreateSession.html
    (the session's keys sign, its token in x-amz-s3session-token) and API_ListObjectsV2.html.
    """

    def __init__(self) -> None:
        self.keys = [f"kv/index/{number:02d}" for number in (7, 1, 9, 3, 5)]
        self.sessions = 0
        self.expired: set[str] = set()
        self.seconds = 300.0

    def __call__(self, head: str) -> bytes:
        headers = headers_of(head)
        target = head.split(" ")[1]
        if "session" in target and "list-type" not in target:
            # With the credentials of the user: "key" is both halves of them here.
            assert assert_signed(head, "key", "us-east-1", "s3express") == "key"
            assert "x-amz-s3session-token" not in headers
            self.sessions += 1
            return self.session()
        token = headers["x-amz-s3session-token"]
        assert assert_signed(head, f"secret{token}", "us-east-1", "s3express") == f"session{token}"
        assert "x-amz-security-token" not in headers
        if token in self.expired:
            return reply(400, b"<Error><Code>ExpiredToken</Code></Error>")
        if "list-type" not in target:
            return serving(head) if head.startswith("GET") else reply(200, ETag='"1"')
        assert "prefix=kv%2Findex%2F&" in f"{target}&", target
        assert "start-after" not in target
        return self.page("continuation-token" in target)

    def session(self) -> bytes:
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=self.seconds)
        fields = {
            "SessionToken": str(self.sessions),
            "SecretAccessKey": f"secret{self.sessions}",
            "AccessKeyId": f"session{self.sessions}",
            "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        inner = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
        return reply(
            200, f"<CreateSessionResult><Credentials>{inner}</Credentials></CreateSessionResult>".encode()
        )

    def page(self, second: bool) -> bytes:
        keys = self.keys[3:] if second else self.keys[:3]
        more = "" if second else "<NextContinuationToken>2</NextContinuationToken>"
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>{int(key[-2:])}</Size>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        truncated = "false" if second else "true"
        body = f"<ListBucketResult><IsTruncated>{truncated}</IsTruncated>{more}{items}</ListBucketResult>"
        return reply(200, body.encode())


EXPRESS = {"bucket": "kv--use1-az4--x-s3", "express": True}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_requests_are_signed_as_the_specification_says(serve: Serve, transport: str) -> None:
    def answer(head: str) -> bytes:
        assert assert_signed(head, "key", "us-east-1", "s3") == "key"
        if "list-type" in head:
            return reply(200, LISTING)
        return serving(head) if head.startswith("GET") else reply(200, ETag='"1"')

    bucket = bucket_of(serve(answer).endpoint, transport=transport)
    assert read(bucket) == DATA[100:50_100]
    assert bucket.put("a b/ü+&=~", DATA)
    assert list(bucket.list("a b/ü+&=~", "a b/ü+&=~x")) == []
    bucket.delete("a b/ü+&=~")
    bucket.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_directory_buckets_are_asked_within_sessions(serve: Serve, transport: str) -> None:
    express = FakeExpress()
    bucket = bucket_of(serve(express).endpoint, transport=transport, **EXPRESS)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    assert bucket.put("a/b", DATA)
    assert express.sessions == 1
    found = list(bucket.list("kv/index/"))
    assert [(item.key, item.size) for item in found] == [(key, int(key[-2:])) for key in sorted(express.keys)]
    assert [item.key for item in bucket.list("kv/index/", "kv/index/05")] == ["kv/index/07", "kv/index/09"]
    assert [item.key for item in bucket.list("kv/index/03")] == ["kv/index/03"]
    bucket.close()


def test_a_session_that_has_expired_is_replaced(serve: Serve) -> None:
    express = FakeExpress()
    bucket = bucket_of(serve(express).endpoint, **EXPRESS)
    assert read(bucket) == DATA[100:50_100]
    express.expired = {"1"}
    assert read(bucket) == DATA[100:50_100]
    assert express.sessions == 2
    # One that is about to expire is not used any more either.
    express.seconds = 10.0
    express.expired = {"1", "2"}
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    assert express.sessions == 5
    bucket.close()


@pytest.mark.parametrize("lacking", ["SessionToken", "AccessKeyId", "Expiration", "Credentials"])
def test_a_session_that_lacks_something_is_a_bad_reply(serve: Serve, lacking: str) -> None:
    express = FakeExpress()

    def answer(head: str) -> bytes:
        assert "session" in head.split(" ")[1]
        body = express.session().partition(b"\r\n\r\n")[2]
        return reply(200, body.replace(lacking.encode(), b"Other"))

    bucket = bucket_of(serve(answer).endpoint, **EXPRESS)
    with pytest.raises(BadReply):
        read(bucket)
    with pytest.raises(BadReply):
        list(bucket.list("a/"))
    bucket.close()


def test_sessions_are_shared_while_they_last() -> None:
    made: list[int] = []

    def create() -> dict[str, Any]:
        made.append(1)
        end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=300)
        return {"AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c", "Expiration": end}

    sessions = Sessions(create)
    assert sessions.refresh_needed()
    assert sessions.get_frozen_credentials() is sessions.get_frozen_credentials()
    assert not sessions.refresh_needed()
    assert sessions.refresh_needed(301)
    assert len(made) == 1


def test_where_directory_buckets_are() -> None:
    host = express_host("team-kv--usw2-az1--x-s3", "us-west-2")
    assert host == "team-kv--usw2-az1--x-s3.s3express-usw2-az1.us-west-2.amazonaws.com"
