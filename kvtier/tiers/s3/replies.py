"""What an S3 server's error replies mean, and what the user should do about them."""

from __future__ import annotations

import email.utils
import re
import time

from kvtier.errors import AccessDenied, KvTierError, TierFull, TierUnavailable
from kvtier.tiers.s3.bucket import (
    BadReply,
    BucketThrottled,
    BucketTimeout,
    ExpiredCredentials,
    ObjectMissing,
    RangeMissing,
)

LONGEST_RETRY_AFTER = 300.0

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_THROTTLED = {
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
}
_FULL = {"QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "EntityTooLarge"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired", "RequestExpired"}
_DENIED = {
    "NoSuchBucket": "create the bucket, or correct its name (s3.bucket)",
    "InvalidBucketName": "correct the bucket's name (s3.bucket)",
    "InvalidAccessKeyId": "check the access key",
    "SignatureDoesNotMatch": "check the secret key",
    "AuthorizationHeaderMalformed": "check the region (s3.region)",
    "PermanentRedirect": "check the region and the endpoint (s3.region, s3.endpoint)",
    "IllegalLocationConstraintException": "check the region (s3.region)",
    "AccountProblem": "the account is suspended; ask whoever runs it",
    "AllAccessDisabled": "the bucket's owner has closed it; ask whoever runs it",
    "KMS.DisabledException": "enable the KMS key (s3.kms_key, or the bucket's)",
    "KMS.NotFoundException": "check the KMS key (s3.kms_key, or the bucket's) and its region",
    "KMS.AccessDeniedException": "allow kms:GenerateDataKey and kms:Decrypt on the KMS key",
}
_CODE = re.compile(r"<Code>([A-Za-z0-9_.-]{1,80})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{0,400})</Message>")


class PutRefused(KvTierError):
    """A PUT was refused: the object exists, or the server does not understand the request.

    Attributes:
        exists: Whether it is the former.
    """

    def __init__(self, message: str, exists: bool):
        """Say which."""
        super().__init__(message)
        self.exists = exists


def read_error(body: bytes) -> tuple[str, str]:
    """Return code and message of an S3 error document, empty where the body is something else."""
    text = body.decode("utf-8", "replace")
    if "<Error" not in text:
        return "", ""
    code, message = _CODE.search(text), _MESSAGE.search(text)
    return code[1] if code else "", message[1] if message else ""


def seconds_of(date: str) -> float | None:
    """Return the seconds since 1970 that the date of a header means; None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):
        return None


def content_range(value: str) -> tuple[int, int, int] | None:
    """Return first byte, last byte and length of the object, as Content-Range tells; None if it does not."""
    match = _CONTENT_RANGE.fullmatch(value)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None


def retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, at most five minutes; None without one."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        moment = seconds_of(value)
        if moment is None:
            return None
        seconds = moment - time.time()
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER) if seconds == seconds else None


def clock_advice(date: str | None) -> str:
    """Say by how much this machine's clock differs from the one that a Date header tells."""
    moment = seconds_of(date or "")
    if moment is None:
        return "set this machine's clock (NTP)"
    ahead = time.time() - moment
    relation = "ahead of" if ahead > 0 else "behind"
    return f"this machine's clock is {abs(ahead):.0f} s {relation} the server's; set it (NTP)"


def error_of(
    what: str, status: int, code: str, detail: str, wait: str | None = None, date: str | None = None
) -> KvTierError:
    """Turn an error reply into one of ours.

    Args:
        what: The request, "PUT kvtier/...".
        status: HTTP status.
        code: S3's error code, empty if there is none.
        detail: What the server says.
        wait: The Retry-After header.
        date: The Date header.
    """
    text = f"{what}: {status} {code} {detail}".rstrip()
    put = what.startswith("PUT")
    if code in _EXPIRED:
        return ExpiredCredentials(f"{text}; renew the credentials")
    if code == "RequestTimeTooSkewed":
        # Signing by the server's clock would work; but index segments are named by this one.
        return AccessDenied(f"{text}; {clock_advice(date)}")
    if code in _DENIED:
        return AccessDenied(f"{text}; {_DENIED[code]}")
    if code in _FULL or status == 507:
        return TierFull(f"{text}; raise the bucket's quota, or free room with `kvtier gc`")
    if code == "InvalidObjectState":
        return ObjectMissing(
            f"{text}; it has been archived: exempt kvtier's prefix from the rule that does it"
        )
    if status == 416:
        return RangeMissing(text)
    if code == "NoSuchKey":
        return ObjectMissing(text)
    if status in (409, 412) and put:
        return PutRefused(text, exists=True)
    if code == "RequestTimeout" or status == 408:
        return BucketTimeout(text)
    if code in _THROTTLED or status in (429, 503):
        return BucketThrottled(text, retry_after(wait))
    if status in (401, 403):
        # Whoever asks for anything else says what that needs.
        usual = what.startswith(("GET ", "PUT ", "LIST ", "DELETE "))
        needs = "; the credentials need s3:GetObject, s3:PutObject, s3:ListBucket and s3:DeleteObject"
        return AccessDenied(text + needs if usual else text)
    if status in (400, 501) and put:
        return PutRefused(text, exists=False)
    if status >= 500:
        return TierUnavailable(text)
    return BadReply(text)
