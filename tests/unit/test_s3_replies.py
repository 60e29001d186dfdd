"""What error replies mean: the kinds of failures, the advice, and what their headers say."""

from __future__ import annotations

import pytest

from kvtier.errors import AccessDenied, KvTierError, TierFull, TierUnavailable
from kvtier.tiers.s3.bucket import BadReply, BucketThrottled, ObjectMissing
from kvtier.tiers.s3.replies import clock_advice, error_of, read_error, retry_after


@pytest.mark.parametrize(
    ("status", "code", "kind", "advice"),
    [
        (403, "RequestTimeTooSkewed", AccessDenied, "s ahead of the server's; set it"),
        (403, "InvalidObjectState", ObjectMissing, "archived"),
        (404, "NoSuchBucket", AccessDenied, "create the bucket"),
        (403, "SignatureDoesNotMatch", AccessDenied, "secret key"),
        (400, "AuthorizationHeaderMalformed", AccessDenied, "region"),
        (403, "QuotaExceeded", TierFull, "quota"),
        (507, "", TierFull, "quota"),
        (400, "ExpiredToken", AccessDenied, "renew"),
        (403, "AccessDenied", AccessDenied, "s3:PutObject"),
        (503, "SlowDown", BucketThrottled, "SlowDown"),
        (500, "InternalError", TierUnavailable, "500"),
        (404, "", BadReply, "404"),
    ],
)
def test_errors_say_what_to_do(status: int, code: str, kind: type[KvTierError], advice: str) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    error = error_of("PUT key", status, code, "the server's words", "7", date)
    assert isinstance(error, kind)
    assert advice in str(error)
    assert getattr(error, "retry_after", 7) == 7


def test_retry_after() -> None:
    assert retry_after(None) is None
    assert retry_after("nonsense") is None
    for endless in (
        "Wed, 21 Oct 2015 07:28:00 +99999999999999999",
        "Wed, 99999999999999999999 Oct 2015 07:28:00",
    ):
        assert retry_after(endless) is None
    assert retry_after("nan") is None
    assert retry_after("3") == 3
    assert retry_after("-3") == 0
    assert retry_after("999999") == 300
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_clocks_that_differ() -> None:
    endless = "Wed, 21 Oct 2015 07:28:00 +99999999999999999"
    assert (
        clock_advice(endless)
        == clock_advice(None)
        == clock_advice("nonsense")
        == "set this machine's clock (NTP)"
    )
    assert "behind" in clock_advice("Wed, 21 Oct 2215 07:28:00 GMT")


def test_error_documents() -> None:
    assert read_error(b"<?xml?><Error><Code>A.b</Code><Message>m n</Message></Error>") == ("A.b", "m n")
    assert read_error(b"<html><Code>A</Code></html>") == ("", "")
    assert read_error(b"\xff\x00") == ("", "")
