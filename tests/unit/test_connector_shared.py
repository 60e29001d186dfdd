"""The stores that the engines of a process share, and their end."""

from __future__ import annotations

import os

import pytest
import torch

from kvtier.config import AgentConfig, Config, MemoryConfig
from kvtier.connector.shared import SharedStore, share_store
from tests.store_support import LAYOUT, make_store


def opened() -> SharedStore:
    config = Config(memory=MemoryConfig(size=8 << 20), agent=AgentConfig(mode="inprocess"))
    return share_store(config, make_store().namespace, LAYOUT, torch.device("cpu"))


def test_one_store_serves_whoever_asks_for_the_same() -> None:
    first, second = opened(), opened()
    assert first is second
    first.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_store_to_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = opened()
    closed: list[int] = []
    monkeypatch.setattr(shared.store, "close", lambda timeout: closed.append(os.getpid()))
    child = os.fork()
    if child == 0:
        shared.close()
        os._exit(len(closed))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    shared.close()
    assert closed == [os.getpid()]
    monkeypatch.undo()
    shared.store.close(1)
