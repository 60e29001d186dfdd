"""Fixtures of the agent's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from kvtier.agent.client import Deadlines
from kvtier.connector import shared
from tests.agent_support import AgentThread, Place


@pytest.fixture
def place() -> Iterator[Place]:
    """A directory for an agent."""
    place = Place()
    yield place
    place.remove()


@pytest.fixture
def agent(place: Place) -> Iterator[AgentThread]:
    """An agent in this process, at `place`."""
    with AgentThread(place) as agent:
        yield agent


@pytest.fixture
def connectors_agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[AgentThread]:
    """An agent in this process that the connectors of this test are configured to use."""
    place = Place(1 << 20)
    file = tmp_path / "kvtier.yaml"
    settings = {"mode": "external", "directory": str(place.directory)}
    file.write_text(yaml.safe_dump({"memory": {"size": "1MiB"}, "agent": settings}))
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    monkeypatch.setattr(shared, "DEADLINES", Deadlines(20.0, 20.0))
    with AgentThread(place) as agent:
        yield agent
    place.remove()
