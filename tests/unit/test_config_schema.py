"""The JSON schema: valid, and of one mind with the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.config import json_schema, machine, parse_config
from kvtier.config.units import DURATION_UNITS, SIZE_UNITS
from kvtier.errors import ConfigError
from tests.unit.config_support import CONFIGS

VALIDATOR = jsonschema.Draft202012Validator(json_schema())
SHIPPED = ["local", "minio", "aws"]


def parses(document: Any) -> bool:
    try:
        parse_config(document)
    except ConfigError:
        return False
    return True


def test_the_schema_is_one_of_2020_12() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema)) == schema
    assert "null" not in json.dumps(schema)


def test_every_key_is_described_and_defaults_are_written_as_in_the_file() -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert "Attributes" not in section["description"]
        for name, key in section["properties"].items():
            assert "$ref" in key or key["description"], name
    assert schema["properties"]["lookup_wait"]["default"] == "50ms"
    assert schema["$defs"]["MemoryConfig"]["properties"]["size"]["default"] == "4GiB"
    assert schema["$defs"]["S3Config"]["properties"]["read_timeout"]["default"] == "5s"
    assert schema["required"] == ["memory"]


def test_the_defaults_of_the_schema_are_those_of_the_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 << 30)
    schema = json_schema()

    def defaults(section: str) -> dict[str, Any]:
        keys = schema["$defs"][section]["properties"] if section else schema["properties"]
        return {name: key["default"] for name, key in keys.items() if "default" in key}

    implied = parse_config({"memory": {}, "s3": {"bucket": "abc"}})
    written = {
        "memory": defaults("MemoryConfig"),
        "s3": {"bucket": "abc", **defaults("S3Config")},
        **defaults(""),
    }
    assert parse_config(written) == implied
    assert VALIDATOR.is_valid(written)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_files_fit(name: str) -> None:
    VALIDATOR.validate(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


MEMORY = {"memory": {"size": "1MiB"}}
S3 = {"bucket": "abc"}
GOOD: list[Any] = [
    MEMORY,
    {"memory": {"size": 1 << 20}},
    {"memory": {"size": "1.5 MiB"}},
    {"memory": {"size": "${KV_UNSET:-1MiB}"}},
    {**MEMORY, "disk": {"path": "/tmp/${KV_UNSET:-x}", "size": "1PB"}},
    {**MEMORY, "disk": {"path": "~/x", "size": 1 << 40}},
    {**MEMORY, "lookup_wait": "0ms", "flush_timeout": "1.5m"},
    {**MEMORY, "s3": S3},
    {
        **MEMORY,
        "s3": {**S3, "prefix": "a/b(c)'!", "region": "us-gov-east-1", "path_style": True, "concurrency": 1},
    },
    {**MEMORY, "s3": {**S3, "path_style": "false", "concurrency": "64", "endpoint": "https://[::1]:9000/"}},
    {**MEMORY, "s3": {**S3, "endpoint": "http://${KV_UNSET:-minio}:9000"}},
    {**MEMORY, "s3": {**S3, "access_key_env": "_A1", "secret_key_env": "B"}},
    {**MEMORY, "s3": {**S3, "encryption": "AES256", "checksums": True}},
    {**MEMORY, "s3": {**S3, "encryption": "aws:kms", "kms_key": "arn:aws:kms:eu-west-1:1:key/a-b"}},
    {**MEMORY, "s3": {"bucket": "kv--use1-az4--x-s3", "express": "true"}},
    {**MEMORY, "s3": {**S3, "ttl": "720h", "quota": "5TiB", "warm_on_start": "100GiB"}},
    {**MEMORY, "s3": {**S3, "ttl": "${KV_UNSET:-30m}", "quota": 1 << 40}},
    {**MEMORY, "agent": {}},
    {**MEMORY, "agent": {"mode": "inprocess"}},
    {**MEMORY, "agent": {"mode": "${KV_UNSET:-external}", "directory": "/run/x", "http": "127.0.0.1:9464"}},
    {**MEMORY, "agent": {"http": "[::1]:80"}},
]
BAD: list[Any] = [
    {},
    None,
    [],
    "memory",
    {"memory": None},
    {"memory": "1MiB"},
    {"memory": {"size": None}},
    {"memory": {"size": 1}},
    {"memory": {"size": -1}},
    {"memory": {"size": 2**61}},
    {"memory": {"size": 1.5}},
    {"memory": {"size": True}},
    {"memory": {"size": "64gb"}},
    {"memory": {"size": ["1MiB"]}},
    {"memory": {"size": "1MiB", "sise": 1}},
    {"memory": {"size": "${A B}"}},
    {"memory": {"size": "$A"}},
    {**MEMORY, "dsik": {}},
    {**MEMORY, "disk": None},
    {**MEMORY, "disk": {}},
    {**MEMORY, "disk": {"path": "/tmp/x"}},
    {**MEMORY, "disk": {"size": "1GiB"}},
    {**MEMORY, "disk": {"path": "x", "size": "1GiB"}},
    {**MEMORY, "disk": {"path": 3, "size": "1GiB"}},
    {**MEMORY, "lookup_wait": 0},
    {**MEMORY, "lookup_wait": 0.05},
    {**MEMORY, "lookup_wait": "50"},
    {**MEMORY, "lookup_wait": "1d"},
    {**MEMORY, "lookup_wait": None},
    {**MEMORY, "s3": {}},
    {**MEMORY, "s3": {"bucket": "A"}},
    {**MEMORY, "s3": {"bucket": "a_b_c"}},
    {**MEMORY, "s3": {**S3, "prefix": "/a"}},
    {**MEMORY, "s3": {**S3, "prefix": ""}},
    {**MEMORY, "s3": {**S3, "endpoint": "minio:9000"}},
    {**MEMORY, "s3": {**S3, "endpoint": "http://minio/bucket"}},
    {**MEMORY, "s3": {**S3, "endpoint": "http://u:p@minio"}},
    {**MEMORY, "s3": {**S3, "endpoint": None}},
    {**MEMORY, "s3": {**S3, "region": "a b"}},
    {**MEMORY, "s3": {**S3, "secret_key": "x"}},
    {**MEMORY, "s3": {**S3, "access_key_env": "${A}", "secret_key_env": "B"}},
    {**MEMORY, "s3": {**S3, "access_key_env": "lower", "secret_key_env": "B"}},
    {**MEMORY, "s3": {**S3, "path_style": "maybe"}},
    {**MEMORY, "s3": {**S3, "path_style": 1}},
    {**MEMORY, "s3": {**S3, "concurrency": 0}},
    {**MEMORY, "s3": {**S3, "concurrency": 1025}},
    {**MEMORY, "s3": {**S3, "concurrency": "x"}},
    {**MEMORY, "s3": {**S3, "encryption": "rot13"}},
    {**MEMORY, "s3": {**S3, "encryption": True}},
    {**MEMORY, "s3": {**S3, "encryption": "aws:kms", "kms_key": "a key"}},
    {**MEMORY, "s3": {**S3, "checksums": "crc32"}},
    {**MEMORY, "s3": {**S3, "express": 1}},
    {**MEMORY, "s3": {**S3, "ttl": 3600}},
    {**MEMORY, "s3": {**S3, "ttl": "30d"}},
    {**MEMORY, "s3": {**S3, "ttl": None}},
    {**MEMORY, "s3": {**S3, "quota": "50%"}},
    {**MEMORY, "s3": {**S3, "quota": 0}},
    {**MEMORY, "s3": {**S3, "warm_on_start": True}},
    {**MEMORY, "agent": None},
    {**MEMORY, "agent": "auto"},
    {**MEMORY, "agent": {"mode": "on"}},
    {**MEMORY, "agent": {"mode": True}},
    {**MEMORY, "agent": {"directory": "run/x"}},
    {**MEMORY, "agent": {"directory": 1}},
    {**MEMORY, "agent": {"http": 9464}},
    {**MEMORY, "agent": {"http": ":9464"}},
    {**MEMORY, "agent": {"http": "http://localhost:9464"}},
]


@pytest.mark.parametrize("document", GOOD, ids=json.dumps)
def test_good_documents(document: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KV_UNSET", raising=False)
    assert VALIDATOR.is_valid(document)
    assert parses(document)


@pytest.mark.parametrize("document", BAD, ids=json.dumps)
def test_bad_documents(document: Any) -> None:
    assert not VALIDATOR.is_valid(document)
    assert not parses(document)


@settings(deadline=None)
@given(
    st.one_of(
        st.text("0123456789.KMGTPiB ", max_size=8),
        st.builds("{}{}".format, st.integers(0), st.sampled_from([*SIZE_UNITS, "mb", "G"])),
    )
)
def test_schema_and_parser_read_the_same_sizes(text: str) -> None:
    document = {**MEMORY, "disk": {"path": "/", "size": text}}
    try:
        parse_config(document)
        said = ""
    except ConfigError as error:
        said = str(error)
    # The range of a size that is written as text is beyond a schema.
    assert VALIDATOR.is_valid(document) == ("disk.size" not in said or "out of range" in said), said


@settings(deadline=None)
@given(
    st.one_of(
        st.text("0123456789.msh ", max_size=6),
        st.builds("{}{}".format, st.integers(0), st.sampled_from([*DURATION_UNITS, "S", "us"])),
    )
)
def test_schema_and_parser_read_the_same_durations(text: str) -> None:
    document = {**MEMORY, "flush_timeout": text}
    try:
        parse_config(document)
        said = ""
    except ConfigError as error:
        said = str(error)
    assert VALIDATOR.is_valid(document) == (not said or "out of range" in said), said
