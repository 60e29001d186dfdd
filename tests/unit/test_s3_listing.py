"""Listings: what servers send, what hostile ones send, and habits that differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.errors import TierError
from kvtier.tiers.s3.boto_bucket import BotoBucket
from kvtier.tiers.s3.bucket import BadReply, ListedObject
from kvtier.tiers.s3.http_bucket import HttpBucket
from kvtier.tiers.s3.listing import (
    MAX_PAGE_BYTES,
    GetPage,
    Page,
    list_in_order,
    list_sorted,
    page_query,
    parse_page,
)
from tests.http_support import Serve, bucket_at, reply, serve

__all__ = ["serve"]

WHEN = "2026-01-01T00:00:00.000Z"


def line(key: str, size: object = 7, when: str = WHEN) -> str:
    return (
        f"<Contents><ETag>&quot;1&quot;</ETag><Key>{key}</Key><Size>{size}</Size>"
        f"<Owner><ID>Size</ID></Owner><LastModified>{when}</LastModified></Contents>"
    )


def listing(*lines: str, more: str = "", truncated: str | None = None, url: bool = False) -> bytes:
    truncated = truncated if truncated is not None else "true" if more else "false"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name>'
        f"<IsTruncated>{truncated}</IsTruncated>"
        + ("<EncodingType>url</EncodingType>" if url else "")
        + (f"<NextContinuationToken>{more}</NextContinuationToken>" if more else "")
        + "".join(lines)
        + "</ListBucketResult>\n"
    ).encode()


keys = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufffe\uffff"), min_size=1
)


@given(st.lists(st.tuples(keys, st.integers(0, 10**17))), st.booleans())
def test_what_is_listed_is_found(items: list[tuple[str, int]], url: bool) -> None:
    page = parse_page(
        listing(*(line(quote(key) if url else escape(key), size) for key, size in items), url=url)
    )
    assert page == Page([ListedObject(key, size, 1767225600.0) for key, size in items], None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2026-01-01T00:00:01Z", 1.0),
        ("2026-01-01T00:00:01.5Z", 1.5),
        ("2026-01-01T00:00:01.250000000+00:00", 1.25),
    ],
)
def test_times(text: str, seconds: float) -> None:
    [item] = parse_page(listing(line("a", when=text))).items
    assert item.modified == 1767225600.0 + seconds


BOMB = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa">'
    + b"".join(b'<!ENTITY a%d "%s">' % (n, b"&a%s;" % (b"%d" % (n - 1) if n else b"") * 10) for n in range(9))
    + b"]><ListBucketResult><IsTruncated>false</IsTruncated>"
    + b"<Contents><Key>&a8;</Key></Contents></ListBucketResult>"
)
FOREIGN = [
    b"",
    b"<html><body>Please sign in</body></html>",
    BOMB,
    listing(line("a"))[:-30],
    listing(line("a", size=-1)),
    listing(line("a", size="1e3")),
    listing(line("a", size="9" * 4000)),
    listing(line("")),
    listing(line("a", when="yesterday")),
    listing(line("a", when="2026-13-01T00:00:00Z")),
    listing("<Contents></Contents>"),
    listing("<Contents>" * 100_000),
    listing(truncated="maybe"),
    listing(truncated="true"),
    b"<ListBucketResult></ListBucketResult>",
]


@pytest.mark.parametrize("body", FOREIGN, ids=range(len(FOREIGN)))
def test_what_is_no_listing_is_a_bad_reply(body: bytes, serve: Serve) -> None:
    with pytest.raises(BadReply):
        parse_page(body)
    bucket = bucket_at(serve(lambda head: reply(200, body)).endpoint)
    with pytest.raises(BadReply):
        list(bucket.list("a/"))


@pytest.mark.parametrize("body", FOREIGN, ids=range(len(FOREIGN)))
def test_the_fallback_refuses_it_too(body: bytes, serve: Serve) -> None:
    """What botocore makes of it may be a listing; nothing but our errors comes out of it."""
    settings: dict[str, Any] = {
        "bucket": "bucket",
        "endpoint": serve(lambda head: reply(200, body)).endpoint,
        "access_key_env": "KVTIER_TEST_KEY",
        "secret_key_env": "KVTIER_TEST_KEY",
    }
    try:
        found = list(BotoBucket(S3Config(**settings), Counters()).list("a/"))
    except (TierError, BadReply):
        return
    assert all(len(item.key) < 10_000 for item in found)


@given(st.binary(max_size=300), st.integers(0, 500))
def test_any_bytes_are_a_page_or_a_bad_reply(noise: bytes, at: int) -> None:
    body = bytearray(listing(line("a/1"), line("a/2"), more="x"))
    body[at : at + len(noise)] = noise
    for data in (noise, bytes(body)):
        try:
            page = parse_page(data)
        except BadReply:
            continue
        assert all(item.key and item.size >= 0 for item in page.items)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_page_without_end_is_left(serve: Serve, chunked: bool) -> None:
    """Ten times what is allowed is announced, or comes without a word; no more than allowed is taken."""
    counters = Counters()
    piece = b" " * 65536

    def answer(head: str) -> bytes:
        if chunked:
            chunks = b"10000\r\n" + piece + b"\r\n"
            return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks * (
                2 * MAX_PAGE_BYTES // len(piece)
            )
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (10 * MAX_PAGE_BYTES) + piece * (
            2 * MAX_PAGE_BYTES // len(piece)
        )

    bucket = bucket_at(serve(answer).endpoint, counters)
    with pytest.raises(BadReply, match="without end"):
        list(bucket.list("a/"))
    bucket.close()


def paged(*pages: Page) -> tuple[list[tuple[str, dict[str, str]]], GetPage]:
    asked: list[tuple[str, dict[str, str]]] = []

    def get_page(prefix: str, more: Mapping[str, str]) -> Page:
        asked.append((prefix, dict(more)))
        return pages[min(len(asked), len(pages)) - 1]

    return asked, get_page


def objects(*names: str) -> list[ListedObject]:
    return [ListedObject(name, 1, 0.0) for name in names]


def test_pages_follow_each_other_and_what_was_not_asked_for_is_left_out() -> None:
    asked, get_page = paged(Page(objects("a/0", "a/2", "a/1", "b"), "t1"), Page(objects("a/2", "a/3"), None))
    assert [item.key for item in list_in_order(get_page, "a/", "a/0")] == ["a/2", "a/3"]
    assert asked == [("a/", {"StartAfter": "a/0"}), ("a/", {"ContinuationToken": "t1"})]


@pytest.mark.parametrize("lister", [list_in_order, list_sorted])
def test_a_listing_that_goes_in_circles_ends(
    lister: Callable[[GetPage, str, str], Iterator[ListedObject]],
) -> None:
    _, get_page = paged(Page(objects("a/1"), "t1"))
    with pytest.raises(BadReply, match="advance"):
        list(lister(get_page, "a/", ""))


def test_a_listing_in_a_circle_of_several_pages_ends() -> None:
    tokens = itertools.cycle(["t1", "t2", "t3"])
    with pytest.raises(BadReply, match="advance"):
        list(list_sorted(lambda *_: Page(objects("a/1"), next(tokens)), "a/", ""))


def test_folders_are_sorted_here_where_the_server_knows_no_order() -> None:
    asked, get_page = paged(Page(objects("a/3", "a/1", "b"), "t1"), Page(objects("a/2", "a/0"), None))
    assert [item.key for item in list_sorted(get_page, "a/", "a/0")] == ["a/1", "a/2", "a/3"]
    assert asked == [("a/", {}), ("a/", {"ContinuationToken": "t1"})]
    asked, get_page = paged(Page(objects("a/3", "a/1"), None))
    assert [item.key for item in list_sorted(get_page, "a/3", "")] == ["a/3"]
    assert asked == [("a/", {})]


def test_queries_are_encoded_and_ordered_as_their_signature_wants_it() -> None:
    assert (
        page_query("a b/ü+", {"StartAfter": "a b/~&1"})
        == "encoding-type=url&list-type=2&prefix=a%20b%2F%C3%BC%2B&start-after=a%20b%2F~%261"
    )


def test_both_clients_find_the_same(serve: Serve) -> None:
    names = [f"a b/{number:02d}&<>%+" for number in range(5)]

    def answer(head: str) -> bytes:
        target = head.split(" ")[1]
        assert "/us-east-1/s3/aws4_request" in head
        if "continuation-token=t%2F1" in target:
            return reply(200, listing(*(line(quote(name)) for name in names[3:]), url=True), Date=DATE)
        assert "prefix=a%20b%2F" in target
        return reply(
            200, listing(*(line(quote(name)) for name in names[:3]), more="t/1", url=True), Date=DATE
        )

    server = serve(answer)
    settings: dict[str, Any] = {
        "bucket": "bucket",
        "endpoint": server.endpoint,
        "access_key_env": "KVTIER_TEST_KEY",
        "secret_key_env": "KVTIER_TEST_KEY",
    }
    for client in (BotoBucket, HttpBucket):
        counters = Counters()
        bucket = client(S3Config(**settings), counters)
        assert [item.key for item in bucket.list("a b/")] == names
        assert counters.snapshot()["list_requests"] == 2
        # One second at most has passed since the server said so.
        assert 0 <= bucket.server_time() - 1767225600 < 60
        bucket.close()


DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
