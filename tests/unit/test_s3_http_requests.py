"""Our own HTTP client: redirects, deadlines, hedges, TLS, credentials, and what errors say."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.errors import AccessDenied
from kvtier.tiers.s3.bucket import BucketTimeout
from kvtier.tiers.s3.hedge import Hedges
from kvtier.tiers.s3.http_bucket import HttpBucket
from kvtier.tiers.s3.http_connection import Origin
from kvtier.tiers.s3.http_exchange import Address, address_of, encode_key, redirected
from kvtier.tiers.s3.http_wire import ReplyHead
from kvtier.tiers.s3.open_bucket import open_bucket
from tests.http_support import (
    DATA,
    Serve,
    asked_range,
    bucket_at,
    read,
    reply,
    serve,
    serving,
)

__all__ = ["serve"]


@pytest.mark.parametrize("status", [301, 307])
def test_redirects_are_followed_and_signed_anew(serve: Serve, status: int) -> None:
    right = serve(serving)
    location = f"http://localhost:{right.port}/bucket/some%20key/!x"
    wrong = serve(lambda head: reply(status, b"<Error/>", Location=location))
    bucket = bucket_at(wrong.endpoint)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    assert f"Host: localhost:{right.port}\r\n" in right.requests[0]
    # What moved for good is not asked for in the old place again.
    assert len(wrong.requests) == (1 if status == 301 else 3)


def test_a_put_is_redirected_with_its_body(serve: Serve) -> None:
    right = serve(lambda head: reply(200, ETag='"1"'))
    wrong = serve(lambda head: reply(307, Location=f"{right.endpoint}/bucket/a/b"))
    assert bucket_at(wrong.endpoint).put("a/b", DATA)
    assert right.bodies == [DATA]


@pytest.mark.parametrize("status", [301, 400])
def test_a_wrong_region_is_corrected(serve: Serve, status: int) -> None:
    def answer(head: str) -> bytes:
        if "/eu-west-3/s3/aws4_request" in head:
            return serving(head)
        return reply(
            status, b"<Error><Code>PermanentRedirect</Code></Error>", x_amz_bucket_region="eu-west-3"
        )

    server = serve(answer)
    bucket = bucket_at(server.endpoint)
    for _ in range(2):
        assert read(bucket) == DATA[100:50_100]
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [301, 400])
def test_listings_find_the_right_region_too(serve: Serve, status: int) -> None:
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    moved = b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>"

    def answer(head: str) -> bytes:
        if "/eu-west-3/s3/aws4_request" in head:
            return reply(200, listing)
        return reply(status, moved, x_amz_bucket_region="eu-west-3")

    server = serve(answer)
    assert list(bucket_at(server.endpoint, region="us-east-1").list("some/")) == []


def test_redirects_in_a_circle_end(serve: Serve) -> None:
    server = serve(lambda head: None)
    turn = iter(range(100))
    server.answer = lambda head: reply(307, Location=f"{server.endpoint}/{next(turn)}/some%20key/!x")
    with pytest.raises(AccessDenied, match="circle"):
        read(bucket_at(server.endpoint))


def test_redirects_go_to_no_worse_place() -> None:
    secure = Address(Origin(True, "bucket.s3.amazonaws.com", 443), "", "us-east-1")

    def moved(**headers: str) -> Address | None:
        names = {name.replace("_", "-"): text for name, text in headers.items()}
        return redirected(secure, ReplyHead(301, names, 0, False, True), "a/key")

    assert moved(location="http://bucket.s3.amazonaws.com/a/key") is None
    assert moved(location="https://bucket.s3.amazonaws.com/other") is None
    assert moved(location="/a/key") is None
    assert moved() is None
    for nowhere in ("https://[bad/a/key", "https://elsewhere:99999/a/key", "https://elsewhere:x/a/key"):
        assert moved(location=nowhere) is None
    there = moved(x_amz_bucket_region="eu-west-1")
    assert there == Address(Origin(True, "bucket.s3.eu-west-1.amazonaws.com", 443), "", "eu-west-1")
    assert moved(location="https://elsewhere:444/b/a/key") == Address(
        Origin(True, "elsewhere", 444), "/b", "us-east-1"
    )


def test_addresses() -> None:
    virtual = address_of("https://s3.eu-west-1.amazonaws.com", "team", False, "eu-west-1")
    assert (virtual.origin.netloc, virtual.target("a b")) == ("team.s3.eu-west-1.amazonaws.com", "/a%20b")
    path = address_of("http://[::1]:9000/", "team", True, "x")
    assert (path.origin.netloc, path.target("k")) == ("[::1]:9000", "/team/k")
    dotted = address_of("https://s3.amazonaws.com", "a.b", False, "us-east-1")
    assert (dotted.origin.host, dotted.path) == ("s3.amazonaws.com", "/a.b")
    assert encode_key("a/b!c*(d)'_-.~") == "a/b%21c%2A%28d%29%27_-.~"


def test_a_refusal_that_comes_before_the_body_was_read_is_understood(serve: Serve) -> None:
    """The server replies and closes while the client is still sending."""
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        connection.sendall(reply(403, b"<Error><Code>AccessDenied</Code></Error>", Connection="close"))
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 20):
            pass
        connection.close()

    serve(lambda head: None)
    threading.Thread(target=refuse, daemon=True).start()
    with pytest.raises(AccessDenied):
        bucket_at(f"http://127.0.0.1:{listener.getsockname()[1]}").put("key", bytes(8 << 20))
    listener.close()


def test_a_request_has_a_deadline_as_a_whole(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps the connection from resting, and the request from nothing."""
    monkeypatch.setattr("kvtier.tiers.s3.http_bucket.SLOWEST_BYTES_PER_SECOND", 1 << 30)
    listener = socket.create_server(("127.0.0.1", 0))
    given_up = threading.Event()

    def trickle() -> None:
        connection, _ = listener.accept()
        connection.recv(4096)
        head = reply(206, Content_Length=1000, Content_Range="bytes 100-1099/2000")
        try:
            for byte in head + bytes(1000):
                connection.sendall(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            given_up.set()

    serve(lambda head: None)
    threading.Thread(target=trickle, daemon=True).start()
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    bucket = bucket_at(endpoint, read_timeout=1.0, connect_timeout=0.1)
    with pytest.raises(BucketTimeout):
        read(bucket, length=1000)
    assert given_up.wait(30)
    listener.close()


def test_slow_first_bytes_are_asked_for_a_second_time(serve: Serve) -> None:
    counters = Counters()
    hang = threading.Event()
    asked: list[str] = []

    def answer(head: str) -> bytes:
        asked.append(head)
        if len(asked) == 65:
            hang.wait(30)
        return serving(head)

    server = serve(answer)
    bucket = bucket_at(server.endpoint, counters, read_timeout=60)
    for _ in range(65):
        assert read(bucket) == DATA[100:50_100]
    assert counters.snapshot()["hedges_won"] == 1
    assert not hang.is_set(), "the slow request was not waited for"
    hang.set()


def stalling(parts: int) -> tuple[Callable[[str], bytes], list[tuple[int, int]]]:
    """Send half of what is asked for and hang, `parts` times; then answer whole."""
    asked: list[tuple[int, int]] = []

    def answer(head: str) -> bytes:
        start, end = asked_range(head)
        asked.append((start, end))
        whole = serving(head)
        if len(asked) > parts:
            return whole
        return whole[: len(whole) - (end + 1 - start) // 2]

    return answer, asked


def experienced(bucket: HttpBucket) -> HttpBucket:
    """Let a bucket have made requests whose first bytes took so long that a busy machine is not slower."""
    for _ in range(100):
        bucket._exchange.hedges.report(0.4)
    return bucket


@pytest.mark.parametrize("stalls", [1, 3])
def test_a_body_that_stalls_is_resumed_on_another_connection(serve: Serve, stalls: int) -> None:
    counters = Counters()
    answer, asked = stalling(stalls)
    server = serve(answer)
    bucket = experienced(bucket_at(server.endpoint, counters, read_timeout=60))
    assert read(bucket) == DATA[100:50_100]
    first, *resumed = asked
    assert first == (100, 50_099)
    assert len(resumed) == stalls
    ends = {end for _, end in resumed}
    starts = [start for start, _ in resumed]
    assert ends == {50_099}
    assert starts == sorted(set(starts))
    assert starts[0] == 25_100
    counts = counters.snapshot()
    assert counts["stalled_bodies"] == stalls
    assert counts["get_bytes"] == 50_000
    assert "retries" not in counts or counts["retries"] == 0


def test_bodies_that_all_stall_are_resumed_for_a_few_and_time_out(serve: Serve) -> None:
    """A bucket that is slow for all must not get more to do."""
    counters = Counters()
    answer, asked = stalling(10_000)
    server = serve(answer)
    bucket = experienced(bucket_at(server.endpoint, counters, read_timeout=0.8))
    for _ in range(3):
        with pytest.raises(BucketTimeout):
            read(bucket)
    assert 1 <= counters.snapshot()["stalled_bodies"] <= 4
    assert len(asked) <= 3 + 4


def test_hedges_are_few_however_slow_the_bucket_is() -> None:
    hedges = Hedges()
    assert hedges.delay() is None
    assert not hedges.take()
    granted = 0
    for _ in range(2000):
        hedges.report(0.1)
        granted += hedges.take()
    assert 0 < granted <= 2000 * 0.05
    assert hedges.delay() == pytest.approx(0.15)


def certificate(directory: Path) -> tuple[ssl.SSLContext, Path]:
    """Make a self-signed certificate for 127.0.0.1."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl command")
    key, file = directory / "key.pem", directory / "certificate.pem"
    command = (
        f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=kvtier-tests "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {file}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return context, file


def test_tls_with_a_ca_of_ones_own(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context, file = certificate(tmp_path)
    server = serve(serving, context)
    with pytest.raises(AccessDenied, match="AWS_CA_BUNDLE"):
        read(bucket_at(server.endpoint))
    monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
    bucket = bucket_at(server.endpoint)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    with pytest.raises(AccessDenied, match="AWS_CA_BUNDLE"):
        read(bucket_at(server.endpoint.replace("127.0.0.1", "localhost")))


def test_expired_credentials_are_looked_up_anew(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_TEST_KEY", "old")

    def answer(head: str) -> bytes:
        if "Credential=old/" in head:
            monkeypatch.setenv("KVTIER_TEST_KEY", "new")
            return reply(400, b"<Error><Code>ExpiredToken</Code></Error>")
        return serving(head)

    server = serve(answer)
    bucket = bucket_at(server.endpoint)
    for _ in range(3):
        assert read(bucket) == DATA[100:50_100]
    assert len(server.requests) == 4


@pytest.mark.parametrize("transport", ["http", "boto3"])
def test_a_credential_process_is_asked_again_when_the_server_calls_its_keys_expired(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Both ways to the bucket: GETs, and the listings that boto3 makes."""
    process = tmp_path / "keys"
    process.write_text(
        f"#!/bin/sh\necho asked >> {tmp_path}/log\nn=$(wc -l < {tmp_path}/log)\n"
        'echo "{\\"Version\\": 1, \\"AccessKeyId\\": \\"key$n\\", \\"SecretAccessKey\\": \\"s\\"}"\n'
    )
    process.chmod(0o755)
    (tmp_path / "config").write_text(f"[default]\ncredential_process = {process}\nregion = us-east-1\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    expired: set[str] = set()
    listing = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"

    def answer(head: str) -> bytes:
        key = head.partition("Credential=")[2].partition("/")[0]
        if key in expired:
            return reply(400, b"<Error><Code>ExpiredToken</Code></Error>")
        return reply(200, listing) if "list-type" in head else serving(head)

    server = serve(answer)
    config = S3Config(bucket="bucket", endpoint=server.endpoint, transport=transport, read_timeout=20)
    bucket = open_bucket(config, Counters())
    for _ in range(2):
        assert read(bucket) == DATA[100:50_100]
        assert list(bucket.list("some/")) == []
        expired |= {f"key{number}" for number in range(1, 9)}
        # Nine so far at most: the process gives a new key each time that it is asked.
        (tmp_path / "log").write_text("asked\n" * 8)
    assert read(bucket) == DATA[100:50_100]
    bucket.close()
