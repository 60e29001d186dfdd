"""Faults of the bucket and of the way to it: misses, never a wrong byte, and recovery without a restart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvtier.cli.s3server import S3Server
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier, boto_bucket, http_bucket
from tests.faults import s3_proxy
from tests.faults.s3_proxy import FaultyProxy, Spoil
from tests.s3_support import (
    WINDOW,
    S3Place,
    assert_nothing_wrong,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    place_on,
    read_all,
)


@pytest.fixture
def proxy(s3_bucket: S3Place) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_bucket.server.endpoint) as running:
        yield running


def open_tier(place: S3Place, **changes: Any) -> S3Tier:
    settings = {"connect_timeout": 0.5, "read_timeout": 0.5, **changes}
    return place.tier(config=place.config(**settings), longest_pause=0.3)


def filled(place: S3Place, count: int = 2 * WINDOW, size: int = 20_000) -> list[StoredBlock]:
    """Store a chain through a healthy tier."""
    blocks = chain(count, size=size)
    tier = place.tier()
    assert tier.write(blocks) == count
    assert tier.flush(60)
    tier.close()
    return blocks


@pytest.fixture(scope="module")
def stocked(s3_server: S3Server) -> tuple[S3Place, list[StoredBlock]]:
    """A place with a chain in it, for tests that only read."""
    with pytest.MonkeyPatch.context() as patch:
        place = place_on(s3_server, patch)
        return place, filled(place)


PARTIAL = (s3_proxy.broken_off, s3_proxy.stalled)


def on_pack_reads(spoil: Spoil) -> Any:
    return lambda method, path, headers: spoil if method == "GET" and ".kvp" in path else None


def assert_recovers(tier: S3Tier, blocks: list[StoredBlock]) -> None:
    """The tier finds its way back by itself, and everything is there."""
    eventually(lambda: tier.match(hashes_of(blocks)) == len(blocks))
    eventually(lambda: read_all(tier, hashes_of(blocks)) == payloads_of(blocks))


@pytest.mark.parametrize(
    ("spoil", "counter"),
    [
        (s3_proxy.range_ignored, "bad_replies"),
        (s3_proxy.shortened, "bad_replies"),
        (s3_proxy.lengthened, "bad_replies"),
        (s3_proxy.shifted, "bad_replies"),
        (s3_proxy.unlabelled, "bad_replies"),
        (s3_proxy.html(200), "bad_replies"),
        (s3_proxy.html(206), "bad_replies"),
        (s3_proxy.html(404), "bad_replies"),
        (s3_proxy.broken_off, "errors_connection"),
        (s3_proxy.hung, "errors_timeout"),
        (s3_proxy.stalled, "errors_timeout"),
        (s3_proxy.error(503, "SlowDown"), "errors_throttled"),
        (s3_proxy.html(503), "errors_throttled"),
        (s3_proxy.error(500, "InternalError"), "errors_unavailable"),
        (s3_proxy.error(403, "AccessDenied"), "errors_denied"),
        (s3_proxy.error(403, "ExpiredToken"), "errors_denied"),
        (s3_proxy.error(404, "NoSuchBucket"), "errors_denied"),
    ],
)
def test_spoilt_reads_are_misses(
    stocked: tuple[S3Place, list[StoredBlock]], proxy: FaultyProxy, spoil: Spoil, counter: str
) -> None:
    place, blocks = stocked
    tier = open_tier(place, endpoint=proxy.endpoint)
    assert tier.match(hashes_of(blocks)) == len(blocks)
    proxy.choose = on_pack_reads(spoil)
    got = read_all(tier, hashes_of(blocks))
    assert_nothing_wrong(got, blocks)
    # What had come before a body broke off is served.
    assert None in got.values() if spoil in PARTIAL else set(got.values()) == {None}
    assert tier.stats()[counter] >= 1
    proxy.choose = lambda method, path, headers: None
    assert_recovers(tier, blocks)
    tier.close()


def test_a_body_that_breaks_off_once_is_resumed(
    stocked: tuple[S3Place, list[StoredBlock]], proxy: FaultyProxy
) -> None:
    place, blocks = stocked
    tier = open_tier(place, endpoint=proxy.endpoint)
    asked: list[tuple[str, str]] = []

    def choose(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if ".kvp" not in path:
            return None
        asked.append((path, headers["Range"].removeprefix("bytes=")))
        return s3_proxy.broken_off if [path for path, _ in asked].count(path) == 1 else None

    proxy.choose = choose
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    # Two packs, each asked for twice, the second time for the rest alone.
    assert len(asked) == 4
    by_path: dict[str, list[int]] = {}
    for path, wanted in asked:
        start, _, end = wanted.partition("-")
        by_path.setdefault(path, []).append(int(end) - int(start) + 1)
    for whole, rest in by_path.values():
        assert 0 < rest < whole
    tier.close()


@pytest.mark.parametrize("spoil", [s3_proxy.stalled, s3_proxy.trickling])
def test_a_body_that_stalls_or_trickles_is_resumed_elsewhere(
    stocked: tuple[S3Place, list[StoredBlock]], proxy: FaultyProxy, spoil: Spoil
) -> None:
    place, blocks = stocked
    tier = open_tier(place, endpoint=proxy.endpoint, read_timeout=60)
    # As after many requests whose first bytes took so long that a busy machine is not slower.
    for _ in range(100):
        tier._bucket._exchange.hedges.report(0.4)
    spoilt: list[str] = []

    def choose(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if ".kvp" not in path or path in spoilt:
            return None
        spoilt.append(path)
        return spoil

    proxy.choose = choose
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    assert tier.stats()["stalled_bodies"] == len(spoilt) == 2
    tier.close()


def test_a_trickling_body_is_a_time_out(
    stocked: tuple[S3Place, list[StoredBlock]], proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, blocks = stocked
    for module in (boto_bucket, http_bucket):
        monkeypatch.setattr(module, "SLOWEST_BYTES_PER_SECOND", 10 << 20)
    tier = open_tier(place, endpoint=proxy.endpoint)
    proxy.choose = on_pack_reads(s3_proxy.trickling)
    got = read_all(tier, hashes_of(blocks))
    assert_nothing_wrong(got, blocks)
    assert None in got.values()
    assert tier.stats()["errors_timeout"] >= 1
    proxy.choose = lambda method, path, headers: None
    assert_recovers(tier, blocks)
    tier.close()


def test_packs_that_are_gone_are_forgotten(
    stocked: tuple[S3Place, list[StoredBlock]], proxy: FaultyProxy
) -> None:
    place, blocks = stocked
    tier = open_tier(place, endpoint=proxy.endpoint)
    proxy.choose = on_pack_reads(s3_proxy.error(404, "NoSuchKey"))
    assert set(read_all(tier, hashes_of(blocks)).values()) == {None}
    assert tier.match(hashes_of(blocks)) == 0
    assert tier.stats()["packs_known"] == 0
    assert not tier.stats()["breaker_open"]
    tier.close()


@pytest.mark.parametrize(
    "spoil",
    [s3_proxy.html(200), s3_proxy.error(503, "SlowDown"), s3_proxy.error(403, "AccessDenied"), s3_proxy.hung],
)
def test_spoilt_listings_open_the_breaker_and_close_it_again(
    stocked: tuple[S3Place, list[StoredBlock]], proxy: FaultyProxy, spoil: Spoil
) -> None:
    place, blocks = stocked
    tier = open_tier(place, endpoint=proxy.endpoint)
    proxy.choose = lambda method, path, headers: spoil if "list-type" in path else None
    eventually(lambda: tier.stats()["breaker_open"])
    assert tier.match(hashes_of(blocks)) == 0
    proxy.choose = lambda method, path, headers: None
    assert_recovers(tier, blocks)
    tier.close()


@pytest.mark.parametrize(
    "spoil", [s3_proxy.html(200), s3_proxy.html(404), s3_proxy.error(500, "InternalError")]
)
def test_a_node_that_starts_in_an_outage_serves_when_it_ends(
    s3_bucket: S3Place, proxy: FaultyProxy, spoil: Spoil
) -> None:
    blocks = filled(s3_bucket)
    proxy.choose = lambda method, path, headers: spoil
    config = s3_bucket.config(endpoint=proxy.endpoint)
    tier = s3_bucket.tier(ready=False, config=config, longest_pause=0.3)
    eventually(lambda: tier.stats()["breaker_open"])
    assert tier.match(hashes_of(blocks)) == 0
    more = chain(3, seed=2)
    assert tier.write(more) == 3
    proxy.choose = lambda method, path, headers: None
    assert tier.flush(60)
    assert_recovers(tier, blocks)
    assert_recovers(tier, more)
    tier.close()


@pytest.mark.parametrize(
    "spoil",
    [
        s3_proxy.html(200),
        s3_proxy.error(503, "SlowDown"),
        s3_proxy.error(500, "InternalError"),
        s3_proxy.error(403, "AccessDenied"),
        s3_proxy.error(409, "ConditionalRequestConflict"),
        s3_proxy.hung,
    ],
)
def test_spoilt_writes_are_repeated_until_they_are_done(
    s3_bucket: S3Place, proxy: FaultyProxy, spoil: Spoil
) -> None:
    """The proxy stores the object and spoils the reply, so that the tier cannot know: the worst case."""
    blocks = chain(WINDOW + 2)
    tier = open_tier(s3_bucket, endpoint=proxy.endpoint)
    puts: list[str] = []

    def choose(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if method != "PUT":
            return None
        puts.append(path)
        return spoil if len(puts) <= 2 else None

    proxy.choose = choose
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(60)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    fresh = s3_bucket.tier()
    assert read_all(fresh, hashes_of(blocks)) == payloads_of(blocks)
    fresh.close()
    tier.close()


def test_a_server_that_rejects_conditional_puts_gets_plain_ones(
    s3_bucket: S3Place, proxy: FaultyProxy
) -> None:
    tier = open_tier(s3_bucket, endpoint=proxy.endpoint)
    conditional: list[bool] = []

    def choose(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if method != "PUT":
            return None
        conditional.append("If-None-Match" in headers)
        return s3_proxy.error(501, "NotImplemented") if conditional[-1] else None

    proxy.choose = choose
    for seed in range(3):
        blocks = chain(3, seed=seed)
        tier.write(blocks)
        assert tier.flush(60)
        assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    assert conditional == [True] + [False] * 6
    assert not tier.stats()["write_breaker_open"]
    tier.close()


def test_server_killed_in_the_middle_of_reads(s3_bucket: S3Place) -> None:
    blocks = filled(s3_bucket, 6 * WINDOW, 100_000)
    tier = open_tier(s3_bucket, concurrency=2)
    first = threading.Event()
    got: dict[bytes, bytes | None] = {}

    def deliver(block_hash: bytes, payload: Any) -> None:
        got[block_hash] = None if payload is None else bytes(payload)
        first.set()

    reading = threading.Thread(target=tier.read, args=(hashes_of(blocks), deliver))
    reading.start()
    assert first.wait(30)
    s3_bucket.server.kill()
    reading.join(60)
    assert not reading.is_alive()
    assert got.keys() == set(hashes_of(blocks))
    assert_nothing_wrong(got, blocks)
    eventually(lambda: tier.stats()["breaker_open"])
    assert tier.match(hashes_of(blocks)) == 0
    s3_bucket.server.restart()
    assert_recovers(tier, blocks)
    tier.close()


def test_server_killed_in_the_middle_of_writes(s3_bucket: S3Place) -> None:
    blocks = chain(8 * WINDOW, size=30_000)
    tier = open_tier(s3_bucket)
    assert tier.write(blocks) == len(blocks)
    eventually(lambda: tier.stats()["packs_uploaded"])
    s3_bucket.server.kill()
    done = tier.match(hashes_of(blocks))
    assert_nothing_wrong(read_all(tier, hashes_of(blocks)), blocks)
    s3_bucket.server.restart()
    assert tier.flush(60)
    assert_recovers(tier, blocks)
    assert done <= len(blocks)
    fresh = s3_bucket.tier()
    assert read_all(fresh, hashes_of(blocks)) == payloads_of(blocks)
    fresh.close()
    tier.close()


def test_a_hung_server_is_a_miss(s3_bucket: S3Place) -> None:
    """SIGSTOP: the kernel still accepts connections, and nothing ever answers."""
    blocks = filled(s3_bucket, 20 * WINDOW, 300)
    tier = open_tier(s3_bucket)
    with s3_bucket.server.paused():
        got = read_all(tier, hashes_of(blocks))
        assert set(got.values()) == {None}
        assert tier.match(hashes_of(blocks)) == 0
        assert tier.stats()["errors_timeout"] >= 1
        more = chain(WINDOW, seed=2)
        assert tier.write(more) == WINDOW
        assert not tier.flush(0.5)
    assert_recovers(tier, blocks)
    assert tier.flush(60)
    assert_recovers(tier, more)
    tier.close()


def test_closing_while_the_server_hangs_keeps_to_its_time(s3_bucket: S3Place) -> None:
    tier = open_tier(s3_bucket)
    with s3_bucket.server.paused():
        blocks = chain(WINDOW)
        tier.write(blocks)
        tier.close(0.2)
        assert tier.stats()["blocks_dropped"] + tier.stats()["pending_bytes"] > 0
    assert tier.match(hashes_of(blocks)) == 0
