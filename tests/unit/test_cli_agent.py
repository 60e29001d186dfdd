"""`kvtier agent` where it cannot start: one sentence, exit code 2."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.agent import wire
from kvtier.agent.place import LOCK
from tests.agent_support import Place


@pytest.fixture
def place() -> Iterator[Place]:
    here = Place()
    yield here
    here.remove()


def start(place: Place, tmp_path: Path, http: str = "127.0.0.1:9464") -> str:
    """Start an agent that cannot; return what it says."""
    file = tmp_path / "kvtier.yaml"
    file.write_text(
        f"memory: {{size: 1MiB}}\nagent: {{mode: external, directory: {place.directory}, http: '{http}'}}\n"
    )
    command = [sys.executable, "-c", "from kvtier.cli import main; main()", "agent", "--config", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_port_that_is_taken(place: Place, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        said = start(place, tmp_path, address)
    assert f"cannot listen on {address}: Address already in use; allowed as agent.http: " in said


def test_files_that_cannot_be_written(place: Place, tmp_path: Path) -> None:
    (place.directory / LOCK).mkdir()
    assert f"{place.directory}: cannot hold the agent's files: Is a directory" in start(place, tmp_path)


def test_a_socket_that_cannot_be_made(place: Place, tmp_path: Path) -> None:
    (place.directory / wire.DOOR).mkdir()
    assert f"{place.directory}: the agent cannot listen: " in start(place, tmp_path)
