"""What the tests of the contract share: a connector on a small pool, over a store of memory alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trtllm_support import Rig, make_rig, memory_stores, write_config


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with memory_stores(monkeypatch, slots=64):
        yield make_rig()
