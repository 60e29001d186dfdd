"""AWS Signature Version 4 from its specification, to check requests by; shares no code with botocore.

https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
import re

_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([a-z0-9-]+)/([a-z0-9]+)/aws4_request, "
    r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})"
)


def assert_signed(head: str, secret: str, region: str, service: str) -> str:
    """Check the signature of a request by its head; return the access key that it names."""
    first, *lines = head.split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    match = _AUTHORIZATION.fullmatch(headers["authorization"])
    assert match, headers["authorization"]
    access, day, *place, signed, signature = match.groups()
    assert place == [region, service], place
    names = signed.split(";")
    assert names == sorted(names)
    assert "host" in names
    # Every x-amz header must be signed.
    assert {name for name in headers if name.startswith("x-amz-")} <= set(names), names
    path, _, query = target.partition("?")
    pairs = sorted(pair if "=" in pair else f"{pair}=" for pair in query.split("&") if pair)
    canonical = "\n".join(
        [
            method,
            path,
            "&".join(pairs),
            *(f"{name}:{' '.join(headers[name].split())}" for name in names),
            "",
            signed,
            headers["x-amz-content-sha256"],
        ]
    )
    moment = headers["x-amz-date"]
    assert moment.startswith(day)
    scope = f"{day}/{region}/{service}/aws4_request"
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    key = f"AWS4{secret}".encode()
    for part in (day, region, service, "aws4_request", f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{digest}"):
        key = hmac.digest(key, part.encode(), "sha256")
    assert key.hex() == signature, canonical
    return access
