"""`kvtier config`, the shipped files, and the page that documents every key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from kvtier.cli.config import app
from kvtier.config import VARIABLE, describe, json_schema, load_config, machine, parse_config
from tests.unit.config_support import CONFIGS

DOCS = CONFIGS.parent / "docs" / "configuration.md"


@pytest.fixture(autouse=True)
def large_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU node with a home directory of its own, and none of the variables that the shipped files read."""
    monkeypatch.setattr(machine, "memory_bytes", lambda: 512 << 30)
    monkeypatch.setattr(machine, "filesystem_bytes", lambda path: 4 << 40)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ["KVTIER_MEMORY", "KVTIER_DISK", "KVTIER_DISK_SIZE", "KVTIER_BUCKET", "KVTIER_PREFIX", VARIABLE]
    for name in [*names, "MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD", "MINIO_PORT"]:
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_schema_is_printed() -> None:
    result = run("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()


def test_check_says_what_a_file_means(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("memory: {size: 64MiB}\ndisk: {path: ~/tier, size: 5GiB}\nlookup_wait: 75ms\n")
    result = run("check", str(file))
    assert result.exit_code == 0
    assert result.stdout.split("\n")[:-1] == describe(load_config(file))
    for part in (
        "memory: 64MiB",
        f"disk: up to 5GiB of compressed blocks below {tmp_path}/tier",
        "75ms",
        "s3: none",
    ):
        assert part in result.stdout
    assert result.stderr == ""


def test_check_reads_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("memory: {size: 64MiB}")
    monkeypatch.setenv(VARIABLE, str(file))
    assert run("check").exit_code == 0
    monkeypatch.delenv(VARIABLE)
    result = run("check")
    assert result.exit_code == 2
    assert "KVTIER_CONFIG" in result.stderr


def test_check_prints_one_message_and_fails(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("memory: {size: 64}\nlookup_weit: 2s\n")
    result = run("check", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert [line.split(" ")[0] for line in result.stderr.splitlines()] == [f"{file}:1:", f"{file}:2:"]
    assert "Traceback" not in result.stderr


def test_description_of_a_bucket_and_its_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "filesystem_bytes", lambda path: 1 << 30)
    monkeypatch.delenv("KV_UNSET", raising=False)
    config = parse_config(
        {
            "memory": {"size": "1MiB"},
            "disk": {"path": str(tmp_path), "size": "2GiB"},
            "s3": {
                "bucket": "abc",
                "region": "eu-west-1",
                "access_key_env": "KV_UNSET",
                "secret_key_env": "KV_UNSET",
            },
        }
    )
    lines = describe(config)
    assert any(
        line.startswith("s3: ") and "bucket abc at AWS, region eu-west-1, below kvtier/" in line
        for line in lines
    )
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "disk.size is 2GiB" in warnings[0]
    assert "has 1GiB" in warnings[0]
    assert "KV_UNSET is not set" in warnings[1]


def test_description_of_what_is_deleted_and_warmed(tmp_path: Path) -> None:
    settings = {"bucket": "abc", "ttl": "720h", "quota": "2TiB", "warm_on_start": "1GiB"}
    memory, disk = {"size": "1MiB"}, {"path": str(tmp_path), "size": "2MiB"}
    lines = describe(parse_config({"memory": memory, "disk": disk, "s3": settings}))
    (deleted,) = [line for line in lines if "deleted" in line]
    assert "720h" in deleted
    assert "2TiB" in deleted
    assert any("1GiB of the most used blocks" in line for line in lines)
    assert not any(line.startswith("warning: s3.warm") for line in lines)
    lines = describe(parse_config({"memory": memory, "s3": settings}))
    assert any(line.startswith("warning: s3.warm_on_start") for line in lines)
    lines = describe(parse_config({"memory": memory, "s3": {"bucket": "abc"}}))
    assert any("what is stored stays" in line for line in lines)


def test_description_of_memory_alone() -> None:
    lines = describe(parse_config({"memory": {"size": "1MiB"}}))
    assert any(line.startswith("warning: with neither disk nor s3") for line in lines)
    assert "miss: the engine computes what is not in memory." in lines


@pytest.mark.parametrize("name", ["local", "minio"])
def test_shipped_files_work_as_they_are(name: str) -> None:
    result = run("check", str(CONFIGS / f"{name}.yaml"))
    assert result.exit_code == 0, result.stderr
    assert "warning" not in result.stdout
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.memory.size == 2 << 30
    assert config.disk is not None
    assert config.disk.path == Path.home() / ".cache/kvtier"
    assert (config.s3 is not None) == (name == "minio")


def test_the_aws_file_asks_for_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_DISK", str(tmp_path))
    result = run("check", str(CONFIGS / "aws.yaml"))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "s3.bucket" in line
    assert "KVTIER_BUCKET" in line
    monkeypatch.setenv("KVTIER_BUCKET", "team-kv")
    config = load_config(CONFIGS / "aws.yaml")
    assert config.memory.size == 64 << 30
    assert config.disk is not None
    assert config.s3 is not None
    assert (config.s3.bucket, config.s3.endpoint, config.s3.credentials()) == ("team-kv", None, None)


def test_engine_options_name_the_connector() -> None:
    options = yaml.safe_load((CONFIGS / "trtllm.yaml").read_text())
    assert options == {
        "kv_cache_config": {"enable_block_reuse": True, "enable_partial_reuse": False},
        "kv_connector_config": {
            "connector_module": "kvtier.trtllm",
            "connector_scheduler_class": "KvTierConnectorLeader",
            "connector_worker_class": "KvTierConnectorWorker",
        },
    }


def test_every_key_and_default_is_documented() -> None:
    page = DOCS.read_text()
    schema = json_schema()
    sections = {
        "": schema,
        **{
            name: schema["$defs"][ref["$ref"].rpartition("/")[2]]
            for name, ref in schema["properties"].items()
            if "$ref" in ref
        },
    }
    assert set(sections) == {"", "memory", "disk", "s3", "agent"}
    for section, described in sections.items():
        for name, key in described["properties"].items():
            if "$ref" in key:
                continue
            dotted = f"{section}.{name}" if section else name
            (row,) = [line for line in page.splitlines() if line.startswith(f"| `{dotted}` |")]
            if "default" in key:
                assert f"`{key['default']}`".replace("`False`", "`false`") in row, row
            elif name in described.get("required", []):
                assert "required" in row, row


def test_the_documented_example_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_DISK", str(tmp_path))
    examples = DOCS.read_text().split("```yaml\n")[1:]
    assert examples
    for example in examples:
        config = parse_config(yaml.safe_load(example.split("```")[0]))
        assert config.memory.size >= 1 << 20
