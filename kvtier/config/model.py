"""The settings themselves: which tiers there are, how large, and how long anything may take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvtier.config import rules
from kvtier.config.units import parse_duration
from kvtier.errors import ConfigError


def _duration(default: str, description: str) -> Any:
    return Field(
        default=parse_duration(default), description=description, json_schema_extra={"default": default}
    )


def _tidy(schema: dict[str, Any]) -> None:
    """Keep of the docstring what helps whoever writes the file; the titles repeat the keys."""
    schema["description"] = schema["description"].partition("\n")[0]
    del schema["title"]
    for described in schema["properties"].values():
        described.pop("title", None)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_tidy)


class MemoryConfig(_Section):
    """The arena: host memory that holds the blocks that can be loaded at once.

    Attributes:
        size: Bytes of the arena.
        format: How blocks lie in it: "raw", or "planes", taken apart in 0.78 of their bytes where that is
            possible (bfloat16).
    """

    # The default is checked too: a small machine has less memory than that.
    size: Annotated[int, rules.MEMORY_SIZE] = Field(
        default=4 << 30,
        validate_default=True,
        description="Size of the arena in host memory.",
        json_schema_extra={"default": "4GiB"},
    )
    format: Annotated[str, rules.MEMORY_FORMAT] = Field(
        default="raw", description="How blocks lie in the arena: raw, or as planes in 0.78 of their bytes."
    )


class DiskConfig(_Section):
    """The tier on the local disk.

    Attributes:
        path: Directory of the tier, absolute; created when the tier opens.
        size: Bytes that it may hold; beyond them the least recently used blocks are evicted.
    """

    path: Annotated[Path, rules.DIRECTORY] = Field(description="Directory of the tier, absolute or below ~.")
    size: Annotated[int, rules.SIZE] = Field(description="Bytes that the tier may hold.")


class S3Config(_Section):
    """The tier in a bucket that all nodes share.

    Attributes:
        bucket: Name of the bucket.
        prefix: What every object key begins with, without slashes at its ends.
        endpoint: URL of the server without trailing slash; None for AWS.
        region: Region; None for that of the usual chain.
        access_key_env: `NAME` of the environment variable that holds the access key, or `NAME:-default`.
        secret_key_env: The same for the secret key.
        path_style: Whether the bucket stands in the path and not in the host name; None: if there is an
            endpoint. `uses_path_style` is the answer.
        connect_timeout: Seconds to connect.
        read_timeout: Seconds without a byte.
        index_refresh: Seconds between looks for index segments of other nodes.
        concurrency: Requests under way at once.
        transport: Client that moves the data: "http" (kvtier's own) or "boto3".
        encryption: Server-side encryption that objects are written with: "AES256" or "aws:kms"; None for what
            the bucket does by itself.
        kms_key: The key of "aws:kms"; None for the account's own.
        checksums: Whether objects are sent with a checksum that the server compares.
        express: Whether the bucket is an S3 Express directory bucket.
        ttl: Seconds without a use after which what is stored is deleted; None: never.
        quota: Bytes that may be stored below the prefix; beyond them the least recently used go; None: any.
        warm_on_start: Bytes of the most used blocks that are brought to the local disk at the start; None:
            nothing.
    """

    bucket: Annotated[str, rules.BUCKET] = Field(description="Name of the bucket.")
    prefix: Annotated[str, rules.PREFIX] = Field(
        default="kvtier", description="What every object key begins with."
    )
    endpoint: Annotated[str, rules.ENDPOINT] | None = Field(
        default=None, description="URL of the server; AWS without it."
    )
    region: Annotated[str, rules.REGION] | None = Field(default=None, description="Region of the bucket.")
    access_key_env: Annotated[str, rules.KEY_SOURCE] | None = Field(
        default=None, repr=False, description="Name of the environment variable with the access key."
    )
    secret_key_env: Annotated[str, rules.KEY_SOURCE] | None = Field(
        default=None, repr=False, description="Name of the environment variable with the secret key."
    )
    path_style: Annotated[bool, rules.FLAG] | None = Field(
        default=None,
        description="Bucket in the path, not in the host name; by default if there is an endpoint.",
    )
    connect_timeout: Annotated[float, rules.duration("1ms", "1m")] = _duration("2s", "Time to connect.")
    read_timeout: Annotated[float, rules.duration("1ms", "10m")] = _duration("5s", "Time without a byte.")
    index_refresh: Annotated[float, rules.duration("100ms", "1h")] = _duration(
        "2s", "Time between looks for what other nodes have stored."
    )
    concurrency: Annotated[int, rules.CONCURRENCY] = Field(
        default=32, description="Requests under way at once."
    )
    transport: Annotated[str, rules.TRANSPORT] = Field(
        default="http", description="Client that moves the data: kvtier's own (http), or boto3."
    )
    encryption: Annotated[str, rules.ENCRYPTION] | None = Field(
        default=None, description="Server-side encryption of what is written; by default the bucket's."
    )
    kms_key: Annotated[str, rules.KMS_KEY] | None = Field(
        default=None, description="KMS key of the encryption aws:kms; by default the account's."
    )
    checksums: Annotated[bool, rules.FLAG] = Field(
        default=False, description="Objects are sent with a CRC32 that the server compares."
    )
    express: Annotated[bool, rules.FLAG] = Field(
        default=False, description="The bucket is an S3 Express directory bucket, NAME--ZONE--x-s3."
    )
    ttl: Annotated[float, rules.duration("10m", "100000h")] | None = Field(
        default=None, description="Time without a use after which what is stored is deleted."
    )
    quota: Annotated[int, rules.SIZE] | None = Field(
        default=None, description="Bytes that may be stored below the prefix; any number without it."
    )
    warm_on_start: Annotated[int, rules.SIZE] | None = Field(
        default=None, description="Bytes of the most used blocks that are brought to the disk at the start."
    )

    @model_validator(mode="after")
    def _check_keys(self) -> S3Config:
        if (self.access_key_env is None) != (self.secret_key_env is None):
            raise ValueError("has only one of access_key_env and secret_key_env; allowed: both or neither")
        defaults = [
            rules.key_source(source)[1] for source in (self.access_key_env, self.secret_key_env) if source
        ]
        if any(defaults) and not rules.is_local(self.endpoint):
            raise ValueError(
                "has a default key for a server that is not on this machine; allowed there: access_key_env "
                "and secret_key_env without :-default"
            )
        return self

    @model_validator(mode="after")
    def _check_kind(self) -> S3Config:
        if self.kms_key is not None and self.encryption != "aws:kms":
            raise ValueError("has a kms_key that nothing uses; allowed: kms_key with encryption: aws:kms")
        named_express = rules.express_zone(self.bucket) is not None
        if self.express and not named_express:
            raise ValueError(
                f"names {self.bucket} an S3 Express bucket; allowed with express: true: names like "
                "team-kv--use1-az4--x-s3"
            )
        if named_express and not self.express:
            raise ValueError(
                f"names the S3 Express bucket {self.bucket} without saying so; allowed: another bucket, or "
                "express: true"
            )
        return self

    @property
    def uses_path_style(self) -> bool:
        """Whether requests name the bucket in the path (True) or in the host name (False)."""
        return self.endpoint is not None if self.path_style is None else self.path_style

    def key_variables(self) -> list[str]:
        """Return the names of the environment variables that hold the keys: two or none."""
        return [
            rules.key_source(source)[0] for source in (self.access_key_env, self.secret_key_env) if source
        ]

    def credentials(self) -> tuple[str, str] | None:
        """Read access key and secret key from the environment variables that the configuration names.

        Returns:
            Access key and secret key, or None where the usual chain applies (AWS_* variables, profile,
            instance or pod role).

        Raises:
            ConfigError: A named variable is not set, or empty, and has no default.
        """
        if self.access_key_env is None or self.secret_key_env is None:
            return None
        return _read_key("access_key_env", self.access_key_env), _read_key(
            "secret_key_env", self.secret_key_env
        )


class AgentConfig(_Section):
    """The node agent: the process that owns memory and tiers, for all engines of the node.

    Attributes:
        mode: "auto": engines use the agent, and start it when none runs; "external": they use it and never
            start it; "inprocess": there is none, and each engine has a store of its own.
        directory: Where its sockets lie; None for the usual place.
        http: "HOST:PORT" of its metrics and health; None for a free port on loopback.
        linger: Seconds without clients after which an agent that an engine started ends.
    """

    mode: Annotated[str, rules.AGENT_MODE] = Field(
        default="auto",
        description="Who starts the agent: engines (auto), others (external), nobody (inprocess).",
    )
    directory: Annotated[Path, rules.SOCKET_DIRECTORY] | None = Field(
        default=None, description="Directory of the agent's sockets; by default one for each configuration."
    )
    http: Annotated[str, rules.ADDRESS] | None = Field(
        default=None, description="HOST:PORT of metrics and health; by default a free port on loopback."
    )
    linger: Annotated[float, rules.duration("1s", "24h")] = _duration(
        "10m", "How long an agent that an engine started stays when no engine uses it."
    )


class Config(_Section):
    """Everything that kvtier can be told.

    Attributes:
        memory: The arena.
        disk: The tier on the local disk, None without one.
        s3: The tier in a bucket, None without one.
        agent: The process that runs the tiers.
        lookup_wait: Seconds that a lookup waits at most for blocks that are being fetched.
        flush_timeout: Seconds that closing may take to write what is pending.
    """

    memory: MemoryConfig
    disk: DiskConfig | None = None
    s3: S3Config | None = None
    agent: AgentConfig = Field(default_factory=AgentConfig)
    lookup_wait: Annotated[float, rules.duration("0ms", "10s")] = _duration(
        "50ms", "How long a lookup waits at most for blocks that are being fetched."
    )
    flush_timeout: Annotated[float, rules.duration("0ms", "1h")] = _duration(
        "10s", "How long closing may take to write what is pending."
    )


def _read_key(key: str, source: str) -> str:
    name, default = rules.key_source(source)
    value = os.environ.get(name) or default
    if not value:
        raise ConfigError(
            f"s3.{key}: the environment variable {name} is not set; set it, or leave access_key_env and "
            "secret_key_env out to use the usual chain (AWS_ACCESS_KEY_ID, profile, instance role)"
        )
    return value
