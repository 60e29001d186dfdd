"""docker-compose.yml: reachable from this machine only, pinned, and what configs/minio.yaml expects."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvtier.config import load_config
from tests.unit.config_support import CONFIGS

FILE = CONFIGS.parent / "docker-compose.yml"
TAG = "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z"


@pytest.fixture
def compose() -> dict[str, Any]:
    document = yaml.safe_load(FILE.read_text())
    assert isinstance(document, dict)
    return document


def expanded(text: str) -> str:
    """Expand `${NAME:-default}` to its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_compose_accepts_the_file() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("no docker client with compose here")
    result = subprocess.run(
        [docker, "compose", "-f", str(FILE), "config", "-q"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"minio", "create-bucket"}
    assert {service["image"] for service in compose["services"].values()} == {TAG}


def test_ports_are_bound_to_this_machine(compose: dict[str, Any]) -> None:
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert published
    for port in published:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", expanded(port)), port
        assert port.startswith("127.0.0.1:")
    for service in compose["services"].values():
        assert service.get("network_mode") is None


def test_the_bucket_is_created_once_the_server_is_healthy(compose: dict[str, Any]) -> None:
    check = compose["services"]["minio"]["healthcheck"]
    assert check["test"] == ["CMD", "mc", "ready", "local"]
    job = compose["services"]["create-bucket"]
    assert job["depends_on"] == {"minio": {"condition": "service_healthy"}}
    assert job["restart"] == "no"
    assert job["entrypoint"] == ["/bin/sh", "-ec"]
    (script,) = job["command"]
    assert re.search(r"^mc mb --ignore-existing minio/kvtier$", script, re.MULTILINE)
    # Compose itself replaces a single dollar; the shell in the container must see these.
    assert len(re.findall(r"\$\$MINIO_ROOT_(?:USER|PASSWORD)\b", script)) == script.count("$") / 2 == 2


def test_data_outlives_the_container(compose: dict[str, Any]) -> None:
    (volume,) = compose["services"]["minio"]["volumes"]
    name, _, target = volume.partition(":")
    assert target == "/data"
    assert name in compose["volumes"]
    assert "/data" in compose["services"]["minio"]["command"].split()


@pytest.mark.parametrize("from_environment", [False, True])
def test_minio_yaml_fits(
    compose: dict[str, Any], monkeypatch: pytest.MonkeyPatch, from_environment: bool, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVTIER_DISK", str(tmp_path))
    monkeypatch.setenv("KVTIER_MEMORY", "1MiB")
    given = {"MINIO_ROOT_USER": "someone", "MINIO_ROOT_PASSWORD": "something", "MINIO_PORT": "9555"}
    for name, value in given.items():
        if from_environment:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    s3 = load_config(CONFIGS / "minio.yaml").s3
    assert s3 is not None

    server = compose["services"]["minio"]
    environment = server["environment"]
    (port,) = [port for port in server["ports"] if port.endswith(":9000")]
    for name in ("MINIO_ROOT_USER", "MINIO_ROOT_PASSWORD"):
        assert environment[name].startswith(f"${{{name}:-")
    assert "${MINIO_PORT:-" in port
    if from_environment:
        assert s3.credentials() == (given["MINIO_ROOT_USER"], given["MINIO_ROOT_PASSWORD"])
        assert s3.endpoint == "http://127.0.0.1:9555"
    else:
        keys = expanded(environment["MINIO_ROOT_USER"]), expanded(environment["MINIO_ROOT_PASSWORD"])
        assert s3.credentials() == keys
        # MinIO refuses shorter ones.
        assert len(keys[0]) >= 3
        assert len(keys[1]) >= 8
        assert s3.endpoint == "http://" + expanded(port).removesuffix(":9000")
    assert f"minio/{s3.bucket}" in compose["services"]["create-bucket"]["command"][0].split()
