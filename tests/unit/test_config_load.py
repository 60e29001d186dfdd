"""Reading configuration files: every value and default, expansion, and where the file is found."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from kvtier.config import (
    VARIABLE,
    Config,
    DiskConfig,
    MemoryConfig,
    S3Config,
    load_config,
    machine,
    parse_config,
)
from kvtier.errors import ConfigError
from tests.unit.config_support import Files

EVERYTHING = """
memory: {size: 64MiB}
disk: {path: DIR/tier, size: 500GiB}
s3:
  bucket: my-bucket
  prefix: team/kv
  endpoint: http://127.0.0.1:9000/
  region: eu-west-1
  access_key_env: SOME_ACCESS
  secret_key_env: SOME_SECRET
  path_style: false
  connect_timeout: 1s
  read_timeout: 3s
  index_refresh: 1m
  concurrency: 8
lookup_wait: 250ms
flush_timeout: 1m
"""


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_everything_given(files: Files) -> None:
    config = files.load(EVERYTHING)
    assert config == Config(
        memory=MemoryConfig(size=64 << 20),
        disk=DiskConfig(path=files.directory / "tier", size=500 << 30),
        s3=S3Config(
            bucket="my-bucket",
            prefix="team/kv",
            endpoint="http://127.0.0.1:9000",
            region="eu-west-1",
            access_key_env="SOME_ACCESS",
            secret_key_env="SOME_SECRET",
            path_style=False,
            connect_timeout=1.0,
            read_timeout=3.0,
            index_refresh=60.0,
            concurrency=8,
        ),
        lookup_wait=0.25,
        flush_timeout=60.0,
    )
    assert not (files.directory / "tier").exists()


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: 8 << 30)
    config = parse_config({"memory": {}, "s3": {"bucket": "b-1"}})
    assert config.memory.size == 4 << 30
    assert config.disk is None
    assert (config.lookup_wait, config.flush_timeout) == (0.05, 10.0)
    s3 = config.s3
    assert s3 is not None
    assert (s3.prefix, s3.endpoint, s3.region, s3.concurrency) == ("kvtier", None, None, 32)
    assert (s3.connect_timeout, s3.read_timeout, s3.index_refresh) == (2.0, 5.0, 2.0)
    assert s3.credentials() is None


@pytest.mark.parametrize(
    ("endpoint", "given", "used"),
    [
        (None, None, False),
        ("http://minio:9000", None, True),
        ("http://minio:9000", False, False),
        (None, True, True),
    ],
)
def test_path_style_follows_the_endpoint(endpoint: str | None, given: bool | None, used: bool) -> None:
    assert S3Config(bucket="abc", endpoint=endpoint, path_style=given).uses_path_style is used


def test_python_takes_seconds_and_files_do_not() -> None:
    assert Config(memory=MemoryConfig(size=1 << 20), lookup_wait=0.2).lookup_wait == 0.2
    with pytest.raises(ConfigError, match=r"lookup_wait: 0\.2 has no unit"):
        parse_config({"memory": {"size": 1 << 20}, "lookup_wait": 0.2})


def test_settings_do_not_change_and_survive_pickling(files: Files) -> None:
    config = files.load(EVERYTHING)
    with pytest.raises(ValidationError):
        config.lookup_wait = 1.0
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("size", ["1MiB", 1 << 20, "1.5MiB", "1048576"])
def test_the_smallest_sizes(size: object) -> None:
    assert parse_config({"memory": {"size": size}}).memory.size >= 1 << 20


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://127.0.0.1:9000",
        "https://s3.example.com",
        "http://[::1]:9000",
        "HTTP://minio",
        "https://a-b.c:443",
    ],
)
def test_endpoints(endpoint: str) -> None:
    assert S3Config(bucket="abc", endpoint=endpoint).endpoint == endpoint


@pytest.mark.parametrize("bucket", ["abc", "a.b-c", "0-0", "x" * 63, "1.2.3", "kv-s3alias"])
def test_bucket_names(bucket: str) -> None:
    assert S3Config(bucket=bucket).bucket == bucket


def test_environment_variables_are_expanded(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KV_SIZE", "3MiB")
    monkeypatch.setenv("KV_BUCKET", "team")
    monkeypatch.setenv("KV_EMPTY", "")
    monkeypatch.delenv("KV_UNSET", raising=False)
    config = files.load(
        """
        memory: {size: "${KV_SIZE}"}
        disk: {path: "DIR/$$x/${KV_UNSET:-a b}", size: "${KV_UNSET:-1}MiB"}
        s3: {bucket: "${KV_BUCKET}-${KV_BUCKET}-1", prefix: "${KV_EMPTY:-p}", concurrency: "${KV_UNSET:-7}",
             path_style: "${KV_UNSET:-true}"}
        """
    )
    assert config.memory.size == 3 << 20
    assert config.disk == DiskConfig(path=files.directory / "$x" / "a b", size=1 << 20)
    assert config.s3 == S3Config(bucket="team-team-1", prefix="p", concurrency=7, path_style=True)


def test_home_is_expanded(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files.directory))
    config = files.load("memory: {size: 1MiB}\ndisk: {path: ~/x, size: 1MiB}")
    assert config.disk is not None
    assert config.disk.path == files.directory / "x"


def test_the_environment_names_the_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(files.directory))
    files.write("memory: {size: 1MiB}")
    for named in (str(files.file), "~/kvtier.yaml"):
        monkeypatch.setenv(VARIABLE, named)
        assert load_config().memory.size == 1 << 20
    other = files.directory / "other.yaml"
    other.write_text("memory: {size: 2MiB}")
    assert load_config(other).memory.size == 2 << 20
    assert load_config(str(other)).memory.size == 2 << 20


@pytest.mark.parametrize("value", [None, ""])
def test_no_file_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE, raising=False)
    else:
        monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=r"no configuration: give the path .*, or set KVTIER_CONFIG to it"):
        load_config()


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError, match=rf"^{missing}: cannot be read: No such file"):
        load_config(missing)
    monkeypatch.setenv(VARIABLE, str(missing))
    with pytest.raises(ConfigError, match=r"cannot be read \(named by KVTIER_CONFIG\): No such file"):
        load_config()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"memory: \xff\xfe")
    with pytest.raises(ConfigError, match=r"x\.yaml: is not UTF-8 text \(byte 8\)"):
        load_config(tmp_path / "x.yaml")


def test_credentials_come_from_the_named_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    s3 = S3Config(bucket="abc", access_key_env="SOME_ACCESS", secret_key_env="SOME_SECRET")
    monkeypatch.setenv("SOME_ACCESS", "access")
    monkeypatch.setenv("SOME_SECRET", "secret")
    assert s3.credentials() == ("access", "secret")
    for unset in ("delete", "empty"):
        if unset == "delete":
            monkeypatch.delenv("SOME_SECRET")
        else:
            monkeypatch.setenv("SOME_SECRET", "")
        with pytest.raises(
            ConfigError, match=r"s3\.secret_key_env: the environment variable SOME_SECRET is not set"
        ):
            s3.credentials()


def test_default_keys_for_a_server_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"access_key_env": "SOME_ACCESS:-a:-b", "secret_key_env": "SOME_SECRET:-${x}"}
    monkeypatch.delenv("SOME_ACCESS", raising=False)
    monkeypatch.setenv("SOME_SECRET", "set")
    for endpoint in ("http://127.0.0.1:9000", "http://localhost", "http://[::1]:1"):
        config = parse_config(
            {"memory": {"size": "1MiB"}, "s3": {"bucket": "abc", "endpoint": endpoint, **keys}}
        )
        assert config.s3 is not None
        assert config.s3.credentials() == ("a:-b", "set")
    for elsewhere in ({"endpoint": "http://10.0.0.1:9000"}, {"endpoint": "http://localhost.example.com"}, {}):
        with pytest.raises(
            ConfigError, match="s3: has a default key for a server that is not on this machine"
        ):
            parse_config({"memory": {"size": "1MiB"}, "s3": {"bucket": "abc", **keys, **elsewhere}})


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(machine, "_CGROUP_LIMITS", (str(tmp_path / "absent"), str(limit)))
    assert machine.memory_bytes() == whole
    for text, expected in (
        ("max\n", whole),
        ("1073741824\n", min(whole, 1 << 30)),
        (f"{whole * 2}\n", whole),
    ):
        limit.write_text(text)
        assert machine.memory_bytes() == expected
