"""What is said about a wrong file: each problem with key, value, what is allowed, file, line; no secret."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.config import (
    Config,
    DiskConfig,
    MemoryConfig,
    S3Config,
    describe,
    load_config,
    machine,
    parse_config,
)
from kvtier.errors import ConfigError
from tests.unit.config_support import Files

MEMORY = "memory: {size: 1MiB}\n"
JARGON = re.compile(
    r"pydantic|validation|Value error|input_value|type=|BaseModel|Traceback|NoneType|<class", re.I
)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def s3(line: str) -> str:
    """Return a document whose line 4 is `line` in the section s3."""
    return f"{MEMORY}s3:\n  bucket: abc\n  {line}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "memory: {size: 64gb}",
            '1: memory.size: "64gb" is no size; allowed: .*GiB.*; did you mean the unit GB\\?',
        ),
        ("memory: {size: -5}", "1: memory.size: -5 is no size; allowed: "),
        ("memory: {size: 2.5}", "1: memory.size: 2.5 is no size; allowed: "),
        ("memory: {size: 010}", '1: memory.size: "010" is no plain decimal number: .*octal'),
        ("memory:\n  size: 1:30\n", '2: memory.size: "1:30" is no plain decimal number: .*base-60'),
        ("memory: {size: 0x4000000}", '1: memory.size: "0x4000000" is no plain decimal number: '),
        ("memory: {size: 67_108_864}", '1: memory.size: "67_108_864" is no plain decimal number: '),
        (s3("quota: 12:30:45"), '4: s3.quota: "12:30:45" is no plain decimal number: '),
        (s3("concurrency: 010"), '4: s3.concurrency: "010" is no plain decimal number: '),
        (s3("index_refresh: 1:30.5"), '4: s3.index_refresh: "1:30.5" is no plain decimal number: '),
        ("memory: {size: yes}", "1: memory.size: true is no size; allowed: "),
        ("memory: {size: [1]}", r"1: memory.size: \[1\] is no size; allowed: "),
        ("memory: {size: 2020-01-01}", '1: memory.size: "2020-01-01" is no size; allowed: '),
        ("memory: {size: 1KiB}", '1: memory.size: "1KiB" is out of range; allowed: 1MiB to 1024PiB'),
        ("memory: {size: 9000PiB}", '1: memory.size: "9000PiB" is out of range; allowed: 1MiB to 1024PiB'),
        ("memory:\n  size:\n", "2: memory.size: has no value; give one, or leave the key out"),
        ("memory:\n", "1: memory: has no value; give one, or leave the key out"),
        (f"{MEMORY}disk:\n", "2: disk: has no value; give one, or leave the key out"),
        (f"{MEMORY}disk: 500GiB\n", '2: disk: "500GiB" is no section; allowed: the keys path, size'),
        ("memory: 4GiB\n", '1: memory: "4GiB" is no section; allowed: the keys size'),
        ("memory: [4GiB]\n", r'1: memory: \["4GiB"\] is no section; allowed: the keys size'),
        (
            f"{MEMORY}disk: {{size: 1GiB}}",
            "2: disk.path: is missing; give it: directory of the tier, absolute or below ~",
        ),
        (f"{MEMORY}disk:\n  path: DIR\n", "2: disk.size: is missing; give it: bytes that the tier may hold"),
        (f"{MEMORY}s3: {{}}", "2: s3.bucket: is missing; give it: name of the bucket"),
        ("lookup_wait: 1s", r" memory: is missing; allowed: a section, such as memory: \{size: 4GiB\}"),
        (
            f"{MEMORY}disk: {{path: x/y, size: 1GiB}}",
            '2: disk.path: "x/y" is a relative path; allowed: an absolute path',
        ),
        (f"{MEMORY}disk: {{path: 7, size: 1GiB}}", "2: disk.path: 7 is no path; allowed: "),
        (f"{MEMORY}disk: {{path: '', size: 1GiB}}", '2: disk.path: "" is no path; allowed: '),
        (f'{MEMORY}disk: {{path: "/a\\0b", size: 1GiB}}', "2: disk.path: .* is no path; allowed: "),
        (
            f"{MEMORY}disk: {{path: ~no-such-user/x, size: 1GiB}}",
            "2: disk.path: .* home directory that is not known",
        ),
        (f"{MEMORY}lookup_wait: 50", "2: lookup_wait: 50 has no unit; allowed: a number with a unit .*250ms"),
        (f"{MEMORY}lookup_wait: 50 sec", '2: lookup_wait: "50 sec" is no duration; allowed: .*ms, s, m, h'),
        (f"{MEMORY}lookup_wait: 50s", '2: lookup_wait: "50s" is out of range; allowed: 0ms to 10s'),
        (f"{MEMORY}flush_timeout: 2h", '2: flush_timeout: "2h" is out of range; allowed: 0ms to 1h'),
        (s3("connect_timeout: 0s"), '4: s3.connect_timeout: "0s" is out of range; allowed: 1ms to 1m'),
        (s3("read_timeout: 1h"), '4: s3.read_timeout: "1h" is out of range; allowed: 1ms to 10m'),
        (s3("index_refresh: 1ms"), '4: s3.index_refresh: "1ms" is out of range; allowed: 100ms to 1h'),
        (s3("concurrency: 0"), "4: s3.concurrency: 0 is no number of requests; allowed: .* from 1 to 1024"),
        (s3("concurrency: many"), '4: s3.concurrency: "many" is no number of requests; allowed: '),
        (s3("concurrency: 2.5"), "4: s3.concurrency: 2.5 is no number of requests; allowed: "),
        (s3("concurrency: true"), "4: s3.concurrency: true is no number of requests; allowed: "),
        (s3("path_style: 1"), "4: s3.path_style: 1 is neither yes nor no; allowed: true, false"),
        (s3("path_style: maybe"), '4: s3.path_style: "maybe" is neither yes nor no; allowed: true, false'),
        (s3("region: us east"), '4: s3.region: "us east" is no region; allowed: .*us-east-1'),
        (s3("region:"), "4: s3.region: has no value; give one, or leave the key out"),
        (s3("prefix: /kv"), '4: s3.prefix: "/kv" is no key prefix; allowed: .*team/kvtier'),
        (s3("prefix: kv/"), '4: s3.prefix: "kv/" is no key prefix; allowed: '),
        (s3("prefix: a//b"), '4: s3.prefix: "a//b" is no key prefix; allowed: '),
        (s3("prefix: ''"), '4: s3.prefix: "" is no key prefix; allowed: '),
        (s3(f"prefix: {'a' * 257}"), r'4: s3.prefix: "a+ \.\.\. is no key prefix; allowed: up to 256'),
        (
            s3("access_key_env: SOME_KEY"),
            "2: s3: has only one of access_key_env and secret_key_env; allowed: both or",
        ),
        (
            s3("encryption: AES"),
            '4: s3.encryption: "AES" is no server-side encryption; allowed: AES256, aws:kms',
        ),
        (s3("encryption: aws:kms\n  kms_key: a b"), '5: s3.kms_key: "a b" is no KMS key; allowed: its ARN'),
        (s3("kms_key: alias/kv"), "2: s3: has a kms_key that nothing uses; allowed: kms_key with encryption"),
        (s3("express: true"), "2: s3: names .* an S3 Express bucket; allowed .* team-kv--use1-az4--x-s3"),
        (
            f"{MEMORY}s3: {{bucket: kv--use1-az4--x-s3}}",
            "2: s3: names the S3 Express bucket .*; allowed: another bucket, or express: true",
        ),
        (f"{MEMORY}{MEMORY}", "2: memory: stands twice, first in line 1; allowed: once"),
        (s3("bucket: abd"), "4: s3.bucket: stands twice, first in line 3; allowed: once"),
        (
            f"{MEMORY}bucket: x",
            "2: bucket: is no known key; allowed: memory, .*; did you mean bucket below s3\\?",
        ),
        (
            f"{MEMORY}s3.bucket: x",
            "2: s3.bucket: is no known key; allowed: memory, .*; did you mean bucket below s3\\?",
        ),
        (
            f"{MEMORY}size: 1GiB",
            "2: size: is no known key; .*; did you mean size below memory or size below disk\\?",
        ),
        (
            s3("lookup_wait: 1s"),
            "4: s3.lookup_wait: is no known key; .*did you mean lookup_wait at the top level\\?",
        ),
        (s3("endpont: x"), "4: s3.endpont: is no known key; allowed: bucket, .*; did you mean endpoint\\?"),
        (s3("qwerty: x"), "4: s3.qwerty: is no known key; allowed: bucket, .*, warm_on_start$"),
        (f"{MEMORY}7: x", "2: 7: is no known key; allowed: memory, disk, s3, agent, .*, flush_timeout$"),
        ("- memory\n", r' is \["memory"\]; allowed: the sections memory, disk, s3 and agent'),
        ("4GiB\n", ' is "4GiB"; allowed: the sections memory, disk, s3 and agent'),
        ("", " is empty; allowed: the sections memory, disk, s3 and agent"),
        ("# only a comment\n", " is empty; allowed: the sections memory, disk, s3 and agent"),
        ("memory: {size: 1MiB\ndisk: 3\n", "2: is no valid YAML: .* in column "),
        ("memory:\n\tsize: 1MiB\n", "2: is no valid YAML: .* in column 1"),
        ("memory: !!python/name:os.system {}\n", "1: is no valid YAML: could not determine a constructor"),
        ("memory: {size: 2020-13-45}\n", " is no valid YAML: month must be in"),
        (f"{MEMORY}---\n{MEMORY}", "2: is no valid YAML: but found another document"),
        (f"{MEMORY}disk: &a\n  b: *a\n", " has YAML aliases"),
        ("a: *unknown\n", " has YAML aliases"),
        ("memory: \x07\n", " is no valid YAML: special characters are not allowed"),
        ("[" * 500, "1: is no valid YAML: "),
        ("[" * 700 + "]" * 700, " is nested too deeply"),
        (
            f"{MEMORY}lookup_wait: $WAIT",
            r'2: lookup_wait: "\$WAIT" has a \$ that begins no \$\{NAME\} or .*write \$\$',
        ),
        (f"{MEMORY}lookup_wait: ${{A B}}", r"2: lookup_wait: .* has a \$ that begins no"),
        (f"{MEMORY}lookup_wait: ${{}}", r"2: lookup_wait: .* has a \$ that begins no"),
        (
            f"{MEMORY}lookup_wait: ${{KV_UNSET}}",
            r'2: lookup_wait: "\$\{KV_UNSET\}" needs the environment variable KV_UNSET, which is not set; ',
        ),
        (
            f"{MEMORY}lookup_wait: ${{KV_UNSET:-50}}",
            r'2: lookup_wait: "50" \(from "\$\{KV_UNSET:-50\}"\) has no unit; allowed: ',
        ),
    ],
)
def test_one_problem(files: Files, monkeypatch: pytest.MonkeyPatch, text: str, said: str) -> None:
    monkeypatch.delenv("KV_UNSET", raising=False)
    line = files.problem(text)
    assert re.match(said, line), line
    assert not JARGON.search(line), line


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("127.0.0.1:9000", "is no URL of a server"),
        ("minio", "is no URL of a server"),
        ("ftp://minio", "is no URL of a server"),
        ("s3://bucket", "is no URL of a server"),
        ("http://", "is no URL of a server"),
        ("http://:9000", "is no URL of a server"),
        ("http:///x", "is no URL of a server"),
        ("http://a b", "is no URL of a server"),
        ("http://minio:port", "is no URL"),
        ("http://minio:99999", "is no URL"),
        ("http://[::1", "is no URL"),
        ("http://minio/bucket", "has a path or a query"),
        ("http://minio?x=1", "has a path or a query"),
        ("http://minio#x", "has a path or a query"),
        ("9000", "is no URL"),
    ],
)
def test_endpoints_that_are_no_url(files: Files, endpoint: str, said: str) -> None:
    line = files.problem(
        s3(f"endpoint: {endpoint}" if endpoint != "http://minio#x" else "endpoint: 'http://minio#x'")
    )
    assert re.match(
        rf'4: s3\.endpoint: "?{re.escape(endpoint)}"? {said}; allowed: http:// or https://', line
    ), line


@pytest.mark.parametrize(
    "bucket",
    [
        "ab",
        "x" * 64,
        "My-Bucket",
        "my_bucket",
        "-abc",
        "abc-",
        ".abc",
        "a..b",
        "192.168.5.4",
        "xn--abc",
        "sthree-abc",
        "a/b",
        "bücket",
        "12345",
        "",
    ],
)
def test_names_that_no_bucket_can_have(files: Files, bucket: str) -> None:
    yaml_value = bucket if bucket != "" else "''"
    line = files.problem(f"{MEMORY}s3:\n  bucket: {yaml_value}\n")
    assert re.match(r"3: s3\.bucket: .*; allowed: ", line), line


def test_all_problems_in_one_message_in_the_order_of_the_file(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KV_UNSET", raising=False)
    found = files.problems(
        """memory: {size: 64gb}
disk:
  path: relative
  size: 10
  size: 20GiB
lookup_wait: 50
lookup_weit: 3s
s3:
  bukket: x
  endpoint: minio
  prefix: ${KV_UNSET}
  region:
"""
    )
    assert [line.split(" ")[0] + line.split(" ")[1] for line in found] == [
        "1:memory.size:",
        "3:disk.path:",
        "5:disk.size:",
        "6:lookup_wait:",
        "7:lookup_weit:",
        "8:s3.bucket:",
        "9:s3.bukket:",
        "10:s3.endpoint:",
        "11:s3.prefix:",
        "12:s3.region:",
    ]


def test_plain_data_is_named_by_its_source() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"memory": {"size": 1}, "s3": None}, source="server_url")
    assert str(caught.value).split("\n") == [
        "server_url: memory.size: 1 is out of range; allowed: 1MiB to 1024PiB",
        "server_url: s3: has no value; give one, or leave the key out",
    ]
    not_a_mapping: Any = ["memory"]
    with pytest.raises(ConfigError, match=r'^here: is \["memory"\]; allowed: '):
        parse_config(not_a_mapping, source="here")


def test_more_memory_than_there_is(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 2 << 30)
    assert files.problem("memory: {size: 3GiB}") == (
        '1: memory.size: "3GiB" is more memory than this machine has; allowed: less than 2GiB, with room '
        "left for the engine (3221225472 against 2147483648 bytes)"
    )
    assert files.problem("memory: {}").startswith(
        "1: memory.size: 4294967296 (the default) is more memory than"
    )
    assert files.load("memory: {size: 2GiB}").memory.size == 2 << 30


def test_a_disk_path_below_a_file(files: Files) -> None:
    line = files.problem(f"{MEMORY}disk: {{path: {files.file}/tier, size: 1GiB}}")
    # A long value is cut short, and a test's directory may be long.
    value, _, reason = line.partition(" cannot be written: ")
    assert value.startswith('2: disk.path: "/')
    assert reason == (
        f"{files.file} is not a directory; allowed: a directory that this user can write or create"
    )
    assert "is not a directory" in files.problem(f"{MEMORY}disk: {{path: {files.file}, size: 1GiB}}")


def test_a_disk_path_that_is_read_only(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, int]] = []

    def refuse(path: Path, mode: int) -> bool:
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr(os, "access", refuse)
    line = files.problem(f"{MEMORY}disk: {{path: DIR/a/b, size: 1GiB}}")
    assert f"cannot be written: {files.directory} is not writable for this user; allowed: " in line
    assert asked == [(files.directory, os.W_OK | os.X_OK)]
    assert not (files.directory / "a").exists()


@pytest.mark.parametrize(
    "key",
    [
        "access_key",
        "secret_key",
        "aws_access_key_id",
        "aws_secret_access_key",
        "AWS_SECRET_ACCESS_KEY",
        "session_token",
        "password",
        "credentials",
        "api_key",
        "key",
        "secretKey",
    ],
)
def test_keys_in_the_file_are_refused(files: Files, key: str) -> None:
    line = files.problem(s3(f"{key}: hunter2"))
    assert line.startswith(
        f"4: s3.{key}: credentials may not stand in the file; put them into environment variables"
    )
    assert "s3.access_key_env" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(
    "line",
    [
        "secret_key: hunter2",
        "secret_key_env: hunter2",
        "secret_key_env: HUNTER+hunter2/x",
        "secret_key_env: ${HUNTER}",
        "access_key_env: ${NAME:-hunter2}",
        "secret_key_env: NAME:-hunter2",
        "secret_key_env: [hunter2]",
        "secret_key_env: {hunter2: hunter2}",
        "endpoint: http://user:hunter2@minio:9000",
        "endpoint: http://user:hunter2@minio:9000/x@y",
        "endpoint: http://user:hunter2/x@minio:9000",
        "endpoint: http://user:hunter2",
        "password: hunter2",
        "endpont: http://user:hunter2@minio",
    ],
)
def test_messages_do_not_show_secrets(files: Files, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("HUNTER", "hunter2")
    said = files.problem(s3(line))
    if line == "endpoint: http://user:hunter2":
        # Nothing tells this password from a port that was mistyped.
        assert "is no URL" in said
        return
    assert "hunter2" not in said, said


@pytest.mark.parametrize("key", ["secret_key", "access_key_env", "password", "passphras"])
def test_numbers_that_may_be_secrets_are_not_shown(files: Files, key: str) -> None:
    assert "0777123" not in files.problem(s3(f"{key}: 0777123"))


def test_nothing_that_is_printed_shows_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_ACCESS", "hunter2")
    monkeypatch.setenv("SOME_SECRET", "hunter2")
    s3 = {
        "bucket": "abc",
        "endpoint": "http://localhost:9000",
        "access_key_env": "SOME_ACCESS:-hunter2",
        "secret_key_env": "SOME_SECRET:-hunter2",
    }
    config = parse_config({"memory": {"size": "1MiB"}, "s3": s3})
    assert config.s3 is not None
    assert config.s3.credentials() == ("hunter2", "hunter2")
    printed = [repr(config), str(config), repr(config.s3), str(config.s3), f"{config}", *describe(config)]
    assert not [text for text in printed if "hunter2" in text]
    with pytest.raises(ValueError, match="environment variable") as caught:
        S3Config(bucket="abc", access_key_env="hunter2", secret_key_env="hunter2")
    assert "hunter2" not in str(caught.value)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.binary(max_size=4),
    st.text(max_size=8),
    st.sampled_from(
        ["1MiB", "2s", "/tmp", "~", "http://minio", "abc", "${KV_UNSET:-1MiB}", "$", "true", "KEY:-x"]
    ),
)
KEYS = st.one_of(
    st.sampled_from(
        [name for model in (Config, MemoryConfig, DiskConfig, S3Config) for name in model.model_fields]
    ),
    st.text(max_size=6),
    st.integers(),
    st.none(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=6)),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.one_of(VALUES, st.fixed_dictionaries({"memory": VALUES, "s3": VALUES}, optional={"disk": VALUES})))
def test_any_data_is_a_configuration_or_refused_in_words(data: Any) -> None:
    try:
        assert isinstance(parse_config(data), Config)
    except ConfigError as error:
        said = str(error)
    else:
        return
    assert said
    assert not re.search(r"Value error|input_value|Traceback|<class", said)


@settings(deadline=None)
@given(st.text("amd: {}[]-\n\t#\"'&*!%@`$?|>~1,.ë\x00", max_size=30))
def test_any_text_is_a_configuration_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text, newline="")
    with pytest.raises(ConfigError, match=f"^{file}"):
        load_config(file)
