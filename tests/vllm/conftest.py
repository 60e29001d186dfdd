"""Engines, agents and a bucket for the tests of the vLLM connector."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.cli.s3server import S3Server
from tests.vllm.engine import EngineProcess

KEYS = ("KVTIER_TEST_ACCESS_KEY", "KVTIER_TEST_SECRET_KEY")
BUCKET = "kvtier-vllm"


class AgentProcess:
    """`kvtier agent` with a configuration."""

    def __init__(self, config: Path, log: Path, environment: dict[str, str]) -> None:
        command = [str(Path(sys.executable).parent / "kvtier"), "agent", "--config", str(config)]
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) == 0


class Node:
    """A machine's kvtier: a configuration of its own, an agent, and engines."""

    def __init__(self, place: Path, name: str, bucket: S3Server | None, memory: str = "256MiB") -> None:
        self.place = place / name
        self.place.mkdir()
        self.environment = {"XDG_RUNTIME_DIR": str(place)}
        text = f"memory: {{size: {memory}}}\ndisk: {{path: {self.place}/disk, size: 2GiB}}\n"
        text += f"agent: {{mode: external, directory: {self.place}/a}}\nlookup_wait: 10s\n"
        if bucket is not None:
            self.environment |= {KEYS[0]: bucket.access_key, KEYS[1]: bucket.secret_key}
            text += (
                f"s3: {{bucket: {BUCKET}, endpoint: '{bucket.endpoint}', region: us-east-1,"
                f" access_key_env: {KEYS[0]}, secret_key_env: {KEYS[1]}, index_refresh: 200ms}}\n"
            )
        self.config = self.place / "kvtier.yaml"
        self.config.write_text(text)
        self.running: list[Any] = []

    def agent(self) -> AgentProcess:
        process = AgentProcess(self.config, self.place / "agent.log", self.environment)
        self.running.append(process)
        return process

    def engine(self, **options: Any) -> EngineProcess:
        process = EngineProcess(self.config, self.place / "engine.log", self.environment, **options)
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in self.running:
            if process.process.poll() is None:
                process.kill()


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def bucket() -> Iterator[S3Server]:
    with S3Server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture(scope="module")
def node(place: Path) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(name: str, bucket: S3Server | None = None, **options: Any) -> Node:
        made.append(Node(place, name, bucket, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture(scope="session")
def plain(place: Path) -> Iterator[EngineProcess]:
    """vLLM without kvtier."""
    engine = EngineProcess(None, place / "plain.log")
    yield engine
    engine.kill()
