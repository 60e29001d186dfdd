"""What only one engine can read does not go where others could find it."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from kvtier import _logging
from kvtier.config import Config
from kvtier.connector.weights import model_facts, private_facts
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.store import open_tiers

LAYOUT = BlockLayout("bfloat16", tokens_per_block=8, layers=2, kv_factor=2, row_elements=512)


def config(tmp_path: Path) -> Config:
    # Nothing listens there; a tier's construction makes no request.
    document = {
        "memory": {"size": "4MiB"},
        "disk": {"path": str(tmp_path / "disk"), "size": "64MiB"},
        "s3": {"bucket": "some-bucket", "endpoint": "http://127.0.0.1:9", "warm_on_start": "1MiB"},
    }
    return Config.model_validate(document)


def tiers_of(tmp_path: Path, model: Any) -> list[str]:
    namespace = Namespace.from_facts({"model": model, "layout": LAYOUT.describe()})
    with ExitStack() as stack:
        tiers = open_tiers(config(tmp_path), namespace, LAYOUT)
        for tier in tiers:
            stack.enter_context(closing(tier))
        return [tier.name for tier in tiers]


def test_a_private_namespace_has_no_bucket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_logging, "_last", {})
    with caplog.at_level(logging.WARNING):
        assert tiers_of(tmp_path, private_facts("some/model")) == ["disk"]
        assert tiers_of(tmp_path, private_facts("some/model")) == ["disk"]
    assert caplog.text.count("is private to one engine") == 1


@pytest.mark.parametrize("model", ["name", {"name": "m", "revision": "0" * 40}, None])
def test_others_have(tmp_path: Path, model: Any) -> None:
    assert tiers_of(tmp_path, model) == ["disk", "s3"]


def test_what_the_connectors_cannot_name_is_private() -> None:
    assert Namespace.from_facts({"model": model_facts(None, None)}).is_private
    assert Namespace.from_facts({"model": model_facts("/nowhere/at/all", "main")}).is_private
    assert not Namespace.from_facts({"model": model_facts("some/model", "0" * 40)}).is_private
