"""Servers that say 403 where there is no object, as AWS does to credentials that may not list everything."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvtier._counters import Counters
from kvtier.errors import AccessDenied
from kvtier.tiers.s3.bucket import Bucket, ObjectMissing
from kvtier.tiers.s3.open_bucket import open_bucket
from tests.faults import s3_proxy
from tests.faults.s3_proxy import FaultyProxy, Reply, Spoil
from tests.s3_support import WINDOW, S3Place, chain, eventually, hashes_of, payloads_of, read_all

REFUSAL = s3_proxy.error(403, "AccessDenied")
TRANSPORTS = ("http", "boto3")


def secretive(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
    def spoil(reply: Reply) -> Reply:
        return REFUSAL(reply) if reply.status == 404 else reply

    return spoil if method == "GET" and "list-type" not in path else None


@pytest.fixture
def proxy(s3_bucket: S3Place) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_bucket.server.endpoint) as running:
        running.choose = secretive
        yield running


@pytest.fixture(params=TRANSPORTS)
def bucket(request: pytest.FixtureRequest, s3_bucket: S3Place, proxy: FaultyProxy) -> Bucket:
    return open_bucket(s3_bucket.config(endpoint=proxy.endpoint, transport=request.param), Counters())


def test_a_node_starts_in_an_empty_prefix_and_forgets_what_is_gone(
    s3_bucket: S3Place, proxy: FaultyProxy
) -> None:
    blocks = chain(2 * WINDOW, size=2_000)
    tier = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint))
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(60)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    s3_bucket.delete(s3_bucket.keys("packs"))
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert tier.match(hashes_of(blocks)) == 0
    # A miss, no refusal: nothing stands still for it, and the blocks are stored again.
    assert not tier.stats()["breaker_open"]
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(60)
    eventually(lambda: read_all(tier, hashes_of(blocks)) == payloads_of(blocks))
    tier.close()


def test_absent_objects_are_missing_and_others_refused(
    s3_bucket: S3Place, proxy: FaultyProxy, bucket: Bucket
) -> None:
    key = f"{s3_bucket.prefix}/some/key"
    with pytest.raises(ObjectMissing):
        bucket.get_tail(key, 10)
    with pytest.raises(ObjectMissing):
        bucket.get_range(key, 0, memoryview(bytearray(5)))
    # One whose key only begins like it is another one.
    assert bucket.put(f"{key}2", b"hello")
    with pytest.raises(ObjectMissing):
        bucket.get_tail(key, 10)
    assert bucket.get_tail(f"{key}2", 10) == (b"hello", 5)
    proxy.choose = lambda method, path, headers: REFUSAL if "list-type" not in path else None
    with pytest.raises(AccessDenied):
        bucket.get_tail(f"{key}2", 10)
    # Where listing is refused as well, nothing can be told.
    proxy.choose = lambda method, path, headers: REFUSAL
    with pytest.raises(AccessDenied):
        bucket.get_tail(key, 10)
    bucket.close()
