"""HTTP/1.1 as far as S3 needs it: the head of a request, the head of a reply, and how long its body is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvtier.tiers.s3.bucket import BadReply

MAX_HEAD_BYTES = 32 << 10
"""A longer reply head is no S3 server's."""

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: [^\r\n]*)?")
# What surrounds a value is stripped afterwards: a pattern that does it takes seconds for 30,000 blanks.
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\r\n\x00]*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_BODILESS = {204, 304}


@dataclass(frozen=True, slots=True)
class ReplyHead:
    """Status line and headers of a reply.

    Attributes:
        status: HTTP status.
        headers: Values by name in lower case; repeated ones joined by ", ".
        length: Bytes of the body; None where it is chunked or ends with the connection.
        chunked: Whether the body comes in chunks.
        keep_alive: Whether the connection serves another request after the body.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    chunked: bool
    keep_alive: bool


def write_head(method: str, target: str, headers: Mapping[str, str]) -> bytes:
    """Return the head of a request; `target` is percent-encoded, `headers` include Host."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    text = "\r\n".join(lines)
    if "\n" in text.replace("\r\n", "") or text.count("\r\n") != len(headers):
        raise ValueError("a request header contains a line break")
    return f"{text}\r\n\r\n".encode("latin-1")


def parse_head(data: bytes) -> ReplyHead:
    """Parse a reply's head (RFC 9112), without the empty line that ends it.

    Raises:
        BadReply: It is none, or its body's length cannot be told for certain.
    """
    status_line, *lines = data.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(status_line)
    if match is None:
        raise BadReply(f"not a reply of an HTTP server: {status_line[:80]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise BadReply(f"not a header of HTTP: {line[:80]!r}")
        name, value = field[1].decode("ascii").lower(), field[2].strip(b" \t").decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    status, coding = int(match[2]), headers.get("transfer-encoding")
    if coding is not None and (coding.lower() != "chunked" or "content-length" in headers):
        raise BadReply(f"a body of unclear length: Transfer-Encoding {coding!r}")
    length = 0 if status < 200 or status in _BODILESS else _content_length(headers)
    # A body that ends with the connection leaves none to keep.
    delimited = length is not None or coding is not None
    options = {option.strip().lower() for option in headers.get("connection", "").split(",")}
    alive = "close" not in options if match[1] == b"1" else "keep-alive" in options
    return ReplyHead(status, headers, length, coding is not None, alive and delimited)


def _content_length(headers: Mapping[str, str]) -> int | None:
    if "content-length" not in headers:
        return None
    values = {value.strip() for value in headers["content-length"].split(",")}
    text = values.pop()
    if values or not _LENGTH.fullmatch(text):
        raise BadReply(f"a body of unclear length: Content-Length {headers['content-length']!r}")
    return int(text)
