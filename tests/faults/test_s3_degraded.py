"""Half a bucket is better than none: read-only, write-only, throttled, full, or with a wrong clock."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults import s3_proxy
from tests.faults.s3_proxy import FaultyProxy, Reply, Spoil
from tests.s3_support import (
    WINDOW,
    S3Place,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)


@pytest.fixture
def proxy(s3_bucket: S3Place) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_bucket.server.endpoint) as running:
        yield running


def refused(status: int, code: str) -> Spoil:
    return s3_proxy.error(status, code)


@pytest.mark.parametrize(
    ("spoil", "counter", "advice"),
    [
        (refused(403, "AccessDenied"), "errors_denied", "s3:PutObject"),
        (refused(403, "QuotaExceeded"), "errors_full", "quota"),
        (refused(507, "InsufficientStorage"), "errors_full", "kvtier gc"),
        (refused(403, "RequestTimeTooSkewed"), "errors_denied", "clock"),
    ],
)
def test_a_bucket_that_takes_no_writes_is_still_read(
    s3_bucket: S3Place,
    proxy: FaultyProxy,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Spoil,
    counter: str,
    advice: str,
) -> None:
    monkeypatch.setattr("kvtier._logging._last", {})
    old, new = chain(WINDOW), chain(WINDOW, seed=2)
    writer = s3_bucket.tier()
    writer.write(old)
    assert writer.flush(60)
    writer.close()
    tier = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint), longest_pause=0.3)
    proxy.choose = lambda method, path, headers: spoil if method == "PUT" else None
    assert tier.write(new) == WINDOW
    assert not tier.flush(0.5)
    assert tier.stats()["write_breaker_open"]
    assert tier.stats()[counter] >= 1
    assert advice in caplog.text
    assert read_all(tier, hashes_of(old)) == payloads_of(old)
    assert not tier.stats()["breaker_open"]
    proxy.choose = lambda method, path, headers: None
    assert tier.flush(60)
    assert read_all(tier, hashes_of(new)) == payloads_of(new)
    tier.close()


def test_a_bucket_that_cannot_be_read_is_still_written(s3_bucket: S3Place, proxy: FaultyProxy) -> None:
    old, new = chain(WINDOW), chain(WINDOW, seed=2)
    tier = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint), longest_pause=0.3)
    tier.write(old)
    assert tier.flush(60)
    spoil = refused(403, "AccessDenied")
    proxy.choose = lambda method, path, headers: spoil if method == "GET" else None
    assert set(read_all(tier, hashes_of(old)).values()) == {None}
    assert tier.stats()["breaker_open"]
    assert tier.match(hashes_of(old)) == 0
    tier.write(new)
    assert tier.flush(60)
    proxy.choose = lambda method, path, headers: None
    eventually(lambda: tier.match(hashes_of(new)) == WINDOW)
    assert read_all(tier, hashes_of(new)) == payloads_of(new)
    tier.close()


@pytest.mark.parametrize(
    "spoil", [refused(503, "SlowDown"), refused(500, "InternalError"), s3_proxy.html(502)]
)
def test_a_passing_fault_costs_a_retry_and_no_miss(
    s3_bucket: S3Place, proxy: FaultyProxy, spoil: Spoil
) -> None:
    blocks = chain(2 * WINDOW)
    tier = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint))
    tier.write(blocks)
    assert tier.flush(60)
    seen: set[str] = set()

    def once(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if method != "GET" or ".kvp" not in path or path in seen:
            return None
        seen.add(path)
        return spoil

    proxy.choose = once
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    assert tier.stats()["retries"] == len(seen) == 2
    tier.close()


def test_a_bucket_that_asks_to_be_left_alone_is(s3_bucket: S3Place, proxy: FaultyProxy) -> None:
    blocks = chain(WINDOW)
    tier = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600))
    tier.write(blocks)
    assert tier.flush(60)
    asked: list[str] = []

    def slow_down(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        asked.append(path)
        return s3_proxy.named("slow", lambda reply: Reply(503, {"Retry-After": "3600"}, b""))

    proxy.choose = slow_down
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert tier.match(hashes_of(blocks)) == 0
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert len(asked) == 1
    tier.close(0)


def test_a_read_gives_up_as_a_whole(s3_bucket: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not begun by the deadline of a whole read is a miss without a request."""
    blocks = chain(3 * WINDOW)
    tier = s3_bucket.tier()
    tier.write(blocks)
    assert tier.flush(60)
    before = tier.stats()["get_requests"]
    monkeypatch.setattr(tier._reader, "_patience", -3600.0)
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert tier.stats()["get_requests"] == before
    assert tier.stats()["late_ranges"] == 3
    tier.close()
