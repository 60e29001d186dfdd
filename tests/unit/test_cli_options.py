"""Options of the commands that look after the bucket: a wrong value is one sentence that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.cli.gc import gc
from kvtier.cli.warm import warm
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
