"""Options of the commands that look after the bucket: a wrong value is one sentence that names it."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.gc import gc
from kvtier.cli.warm import warm
from kvtier.config import S3Config, parse_config
from kvtier.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEY", "x")
    file = tmp_path / "kvtier.yaml"
    file.write_text(
        f"memory: {{size: 1MiB}}\ndisk: {{path: {tmp_path}/disk, size: 64MiB}}\n"
        "s3: {bucket: none, endpoint: 'http://127.0.0.1:9', access_key_env: KEY, secret_key_env: KEY}\n"
    )
    return file


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ttl": "foo"}, '^--ttl: "foo" is no duration; allowed: '),
        ({"quota": "5 apples"}, '^--quota: "5 apples" is no size; allowed: '),
        ({"grace": "5"}, '^--grace: "5" has no unit; allowed: '),
    ],
)
def test_gc_names_the_option(config: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        gc(config, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"top": "3q"}, '^--top: "3q" is no size; allowed: '),
        ({"top": "0B"}, '^--top: "0B" is nothing'),
        ({"top": "1MiB", "rate": "fast"}, '^--rate: "fast" is no size; allowed: '),
    ],
)
def test_warm_names_the_option(config: Path, options: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        warm(config, **options)


@pytest.mark.parametrize("option", ["--prompts", "--tokenizer"])
def test_warm_looks_for_its_files_before_it_reads_the_bucket(config: Path, option: str) -> None:
    result = CliRunner().invoke(app, ["warm", "--config", str(config), option, "/kvtier/nowhere"])
    assert result.exit_code == 2
    assert "does not exist" in result.stderr


def test_the_demo_uses_a_bucket_as_its_file_says() -> None:
    """A bucket that wants encryption, checksums or another client gets them from the demo's engines, too."""
    settings = S3Config(
        bucket="team-kv",
        region="eu-west-1",
        connect_timeout="1500ms",
        read_timeout="2m",
        encryption="aws:kms",
        kms_key="alias/kv",
        checksums=True,
        transport="boto3",
        concurrency=7,
        ttl="720h",
        quota="1TiB",
        warm_on_start="1GiB",
    )
    # The package's attribute of this name is the command.
    section = importlib.import_module("kvtier.cli.demo")._section(settings)
    meant = parse_config({"memory": {"size": "1MiB"}, "s3": section}).s3
    assert meant == settings.model_copy(update={"ttl": None, "quota": None, "warm_on_start": None})
