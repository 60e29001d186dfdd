"""The files that start an agent: they fit the configuration and the command."""

from __future__ import annotations

import configparser
import inspect
import json
from pathlib import Path

import pytest
import yaml

from kvtier import __version__
from kvtier.cli.agent import agent
from kvtier.config import load_config, machine, parse_config

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(autouse=True)
def gpu_node(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: 512 << 30)
    monkeypatch.setattr(machine, "directory_problem", lambda path: None)
    for name in ("KVTIER_MEMORY", "KVTIER_DISK_SIZE"):
        monkeypatch.delenv(name, raising=False)


def check_command(words):
    assert words[-3:-1] == ["agent", "--config"]
    assert "config" in inspect.signature(agent).parameters


def test_systemd():
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",))
    unit.optionxform = str
    unit.read(DEPLOY / "systemd" / "kvtier-agent.service")
    service = unit["Service"]
    check_command(service["ExecStart"].split())
    config = load_config(DEPLOY / "systemd" / "kvtier.yaml")
    assert config.agent.mode == "external"
    assert str(config.agent.directory) == f"/run/{service['RuntimeDirectory']}"
    assert str(config.disk.path) == f"/var/cache/{service['CacheDirectory']}"
    assert int(service["TimeoutStopSec"]) > config.flush_timeout
    assert service["RuntimeDirectoryMode"] == "0700"


def test_kubernetes():
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "agent.yaml").read_text()))
    config_map, daemon_set = documents
    config = parse_config(yaml.safe_load(config_map["data"]["kvtier.yaml"]))
    assert config.agent.mode == "external"
    pod = daemon_set["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_command(container["command"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["sockets"] == str(config.agent.directory)
    assert mounts["disk"] == str(config.disk.path)
    assert f"{mounts['config']}/kvtier.yaml" == container["command"][-1]
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)
    assert pod["terminationGracePeriodSeconds"] > config.flush_timeout
    port = container["ports"][0]["containerPort"]
    assert config.agent.http == f"0.0.0.0:{port}"
    assert daemon_set["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(port)
    assert container["image"] == f"kvtier:{__version__}"
    probes = {container[name]["httpGet"]["path"] for name in ("readinessProbe", "livenessProbe")}
    assert probes == {"/readyz", "/healthz"}
    assert config.memory.size < 72 << 30


def test_image():
    """It is what the manifest runs, of files that are there."""
    lines = (DEPLOY / "kubernetes" / "Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert {"pyproject.toml", "kvtier"} < set(copied)
    assert all((DEPLOY.parent / name).exists() for name in copied)
    assert any(f"-t kvtier:{__version__} -f deploy/kubernetes/Dockerfile ." in line for line in lines)
    (command,) = [line.removeprefix("CMD ") for line in lines if line.startswith("CMD ")]
    check_command(json.loads(command))
