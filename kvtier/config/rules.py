"""What each kind of value must look like, for the file, for Python and for the JSON schema."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo
from pydantic_core import CoreSchema, core_schema

from kvtier.config import machine
from kvtier.config.units import (
    DURATION_PATTERN,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

REFERENCE_PATTERN = r"\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}"
"""`${NAME}` and `${NAME:-default}`, which stand for the value of an environment variable: groups 1 and 3."""

TRANSPORTS = ("http", "boto3")
ENCRYPTIONS = ("AES256", "aws:kms")
MEMORY_FORMATS = ("raw", "planes")
AGENT_MODES = ("auto", "external", "inprocess")

_MAX_SIZE = 2**60
# A socket's whole path has to fit into 107 bytes.
_MAX_SOCKET_DIRECTORY = 80
_BUCKET_PATTERN = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
_PREFIX_PATTERN = r"[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*"
_EXPRESS_PATTERN = r".+--([a-z0-9-]+)--x-s3"
_KMS_KEY_PATTERN = r"[A-Za-z0-9:/_-]{1,2048}"
_KEY_SOURCE_PATTERN = r"([A-Z_][A-Z0-9_]*)(:-(.+))?"


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """One kind of value, to be used as annotation: `Annotated[int, Rule(...)]`.

    Attributes:
        check: Takes the value, and whether it comes from a file; returns what the attribute holds or raises
            ValueError with a text that continues the sentence "KEY: VALUE ...".
        schema: JSON schema of the value as it may stand in the file.
    """

    check: Callable[[Any, bool], Any]
    schema: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let pydantic validate with `check`; a validation context means that a file is being read."""

        def validate(value: Any, info: ValidationInfo) -> Any:
            return self.check(value, info.context is not None)

        return core_schema.with_info_plain_validator_function(validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Let pydantic describe the value by `schema`."""
        return dict(self.schema)


def key_source(text: str) -> tuple[str, str | None]:
    """Split `NAME` or `NAME:-default` of a checked `*_key_env` into the variable's name and the default."""
    match = re.fullmatch(_KEY_SOURCE_PATTERN, text)
    if match is None:
        raise ValueError("not the name of an environment variable")
    return match[1], match[3]


def express_zone(bucket: str) -> str | None:
    """Return the zone in the name of an S3 Express directory bucket, None for other buckets."""
    match = re.fullmatch(_EXPRESS_PATTERN, bucket)
    return match[1] if match else None


def is_local(endpoint: str | None) -> bool:
    """Tell whether an endpoint is on this machine: localhost or a loopback address."""
    host = urlsplit(endpoint or "").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _text_schema(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": _or_reference(pattern)}


def _or_reference(pattern: str) -> str:
    """Match `pattern`, or any text with a reference in it: its meaning shows only when it is expanded."""
    return f"^({pattern}|.*{REFERENCE_PATTERN}.*)$"


def _check_size(value: Any, from_file: bool) -> int:
    size = parse_size(value)
    if not 2**20 <= size <= _MAX_SIZE:
        raise ValueError(f"is out of range; allowed: {format_size(2**20)} to {format_size(_MAX_SIZE)}")
    return size


def _check_memory(value: Any, from_file: bool) -> int:
    size = _check_size(value, from_file)
    available = machine.memory_bytes()
    if size > available:
        raise ValueError(
            f"is more memory than this machine has; allowed: less than {format_size(available)}, with room "
            f"left for the engine ({size} against {available} bytes)"
        )
    return size


def _check_path(value: Any, from_file: bool) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("is no path; allowed: the absolute path of a directory, or one below ~")
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(
            "begins with a home directory that is not known; allowed: an absolute path"
        ) from error
    if not path.is_absolute():
        raise ValueError("is a relative path; allowed: an absolute path, or one below ~")
    problem = machine.directory_problem(path)
    if problem:
        raise ValueError(
            f"cannot be written: {problem}; allowed: a directory that this user can write or create"
        )
    return path


def _check_bucket(value: Any, from_file: bool) -> str:
    allowed = "3 to 63 lower-case letters, digits, dots and hyphens, the first and last a letter or digit"
    if not isinstance(value, str) or not re.fullmatch(_BUCKET_PATTERN, value) or ".." in value:
        raise ValueError(f"is no bucket name; allowed: {allowed}, no two dots in a row")
    if re.fullmatch(r"[0-9]+(\.[0-9]+){3}", value):
        raise ValueError(f"looks like an IP address; allowed: {allowed}")
    if value.startswith(("xn--", "sthree-")):
        raise ValueError(
            "begins with a prefix that S3 reserves; allowed: names not beginning with xn-- or sthree-"
        )
    return value


def _check_prefix(value: Any, from_file: bool) -> str:
    if not isinstance(value, str) or len(value) > 256 or not re.fullmatch(_PREFIX_PATTERN, value):
        raise ValueError(
            "is no key prefix; allowed: up to 256 letters, digits and !_.*'()- with single slashes between, "
            "none at the ends, such as team/kvtier"
        )
    return value


def _check_endpoint(value: Any, from_file: bool) -> str:
    allowed = "http:// or https:// with a host and perhaps a port, such as http://127.0.0.1:9000"
    if not isinstance(value, str):
        raise ValueError(f"is no URL; allowed: {allowed}")
    try:
        url = urlsplit(value)
        url.port  # noqa: B018 - raises ValueError for a port that is no number or out of range
    except ValueError as error:
        raise ValueError(f"is no URL; allowed: {allowed}") from error
    if url.scheme not in ("http", "https") or not url.hostname or re.search(r"[\s\x00-\x1f]", value):
        raise ValueError(f"is no URL of a server; allowed: {allowed}")
    if url.username is not None or url.password is not None:
        raise ValueError(
            f"carries credentials, which belong into access_key_env and secret_key_env; allowed: {allowed}"
        )
    if url.path not in ("", "/") or "?" in value or "#" in value:
        raise ValueError(f"has a path or a query; allowed: {allowed}; the bucket goes into s3.bucket")
    return value.rstrip("/")


def _check_region(value: Any, from_file: bool) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9-]{1,64}", value):
        raise ValueError("is no region; allowed: letters, digits and hyphens, such as us-east-1")
    return value


def _check_key_source(value: Any, from_file: bool) -> str:
    # The message must not show the value: it may be a secret, put here by mistake.
    if not isinstance(value, str) or not re.fullmatch(_KEY_SOURCE_PATTERN, value):
        raise ValueError(
            "must be the name of an environment variable in capitals, such as MINIO_ACCESS_KEY, without ${}, "
            "never the key itself"
        )
    return value


def _check_concurrency(value: Any, from_file: bool) -> int:
    number = int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,4}", value) else value
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number <= 1024:
        raise ValueError("is no number of requests; allowed: a whole number from 1 to 1024")
    return number


def _check_flag(value: Any, from_file: bool) -> bool:
    flag = {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise ValueError("is neither yes nor no; allowed: true, false")
    return flag


def _check_transport(value: Any, from_file: bool) -> str:
    if value not in TRANSPORTS:
        raise ValueError(f"is no client; allowed: {', '.join(TRANSPORTS)}")
    return str(value)


def _check_encryption(value: Any, from_file: bool) -> str:
    if value not in ENCRYPTIONS:
        raise ValueError(f"is no server-side encryption; allowed: {', '.join(ENCRYPTIONS)}")
    return str(value)


def _check_kms_key(value: Any, from_file: bool) -> str:
    if not isinstance(value, str) or not re.fullmatch(_KMS_KEY_PATTERN, value):
        raise ValueError("is no KMS key; allowed: its ARN, id or alias, letters, digits and :/_-")
    return value


def _check_memory_format(value: Any, from_file: bool) -> str:
    if value not in MEMORY_FORMATS:
        raise ValueError(f"is no form of blocks in memory; allowed: {', '.join(MEMORY_FORMATS)}")
    return str(value)


def _check_agent_mode(value: Any, from_file: bool) -> str:
    if value not in AGENT_MODES:
        raise ValueError(f"is no way to run the store; allowed: {', '.join(AGENT_MODES)}")
    return str(value)


def _check_socket_directory(value: Any, from_file: bool) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("is no path; allowed: the absolute path of a directory")
    path = Path(value)
    if not path.is_absolute():
        raise ValueError("is a relative path; allowed: an absolute path")
    if len(os.fsencode(path)) > _MAX_SOCKET_DIRECTORY:
        raise ValueError(
            f"is too long for the names of sockets below it; allowed: up to {_MAX_SOCKET_DIRECTORY} bytes"
        )
    return path


def _check_address(value: Any, from_file: bool) -> str:
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    valid_port = re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535
    if not re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]", host) or not valid_port:
        raise ValueError("is no address; allowed: HOST:PORT, such as 127.0.0.1:9464")
    return str(value)


def duration(minimum: str, maximum: str) -> Rule:
    """Make the rule for a duration between two others: text in a file, seconds (or text) in Python."""
    low, high = parse_duration(minimum), parse_duration(maximum)

    def check(value: Any, from_file: bool) -> float:
        plain = isinstance(value, int | float) and not isinstance(value, bool) and not from_file
        seconds = float(value) if plain else parse_duration(value)
        if not low <= seconds <= high:
            raise ValueError(f"is out of range; allowed: {format_duration(low)} to {format_duration(high)}")
        return seconds

    return Rule(check, _text_schema(DURATION_PATTERN))


_SIZE_SCHEMA = {
    "type": ["string", "integer"],
    "pattern": _or_reference(SIZE_PATTERN),
    "minimum": 2**20,
    "maximum": _MAX_SIZE,
}

SIZE = Rule(_check_size, _SIZE_SCHEMA)
MEMORY_SIZE = Rule(_check_memory, _SIZE_SCHEMA)
DIRECTORY = Rule(_check_path, _text_schema("[/~].*"))
BUCKET = Rule(_check_bucket, _text_schema(_BUCKET_PATTERN))
PREFIX = Rule(_check_prefix, _text_schema(_PREFIX_PATTERN))
ENDPOINT = Rule(_check_endpoint, _text_schema(r"https?://[^\s/?#@]+/?"))
REGION = Rule(_check_region, _text_schema("[A-Za-z0-9-]{1,64}"))
KEY_SOURCE = Rule(_check_key_source, {"type": "string", "pattern": f"^{_KEY_SOURCE_PATTERN}$"})
CONCURRENCY = Rule(
    _check_concurrency,
    {"type": ["integer", "string"], "minimum": 1, "maximum": 1024, "pattern": _or_reference("[0-9]{1,4}")},
)
TRANSPORT = Rule(_check_transport, _text_schema("|".join(TRANSPORTS)))
ENCRYPTION = Rule(_check_encryption, _text_schema("|".join(ENCRYPTIONS)))
KMS_KEY = Rule(_check_kms_key, _text_schema(_KMS_KEY_PATTERN))
MEMORY_FORMAT = Rule(_check_memory_format, _text_schema("|".join(MEMORY_FORMATS)))
AGENT_MODE = Rule(_check_agent_mode, _text_schema("|".join(AGENT_MODES)))
SOCKET_DIRECTORY = Rule(_check_socket_directory, _text_schema("/.*"))
ADDRESS = Rule(_check_address, _text_schema(r"([A-Za-z0-9.-]+|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}"))
FLAG = Rule(_check_flag, {"type": ["boolean", "string"], "pattern": _or_reference("true|false")})
