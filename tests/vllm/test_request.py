"""What tells requests apart whose tokens are the same."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from kvtier.connector.adapters import Adapters
from kvtier.vllm.request import Identity, RequestState


def request(path: Path | None = None, number: int = 1, **given: Any) -> Any:
    lora = SimpleNamespace(lora_int_id=number, lora_path=str(path)) if path else None
    facts: dict[str, Any] = {
        "prompt_token_ids": [1, 2],
        "pooling_params": None,
        "lora_request": lora,
        "mm_features": [],
        "cache_salt": None,
    }
    return SimpleNamespace(**{**facts, **given})


def adapter(place: Path, weights: bytes) -> Path:
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps({"r": 8}))
    (place / "adapter_model.bin").write_bytes(weights)
    return place


def read(adapters: Adapters, asked: Any) -> Identity:
    """Ask until the adapter's files have been read."""
    until = time.monotonic() + 20
    while (identity := Identity.of(asked, adapters)) is None:
        assert time.monotonic() < until, "the adapter is never read"
        time.sleep(0.01)
    return identity


def test_adapters_are_told_apart_by_their_content_and_not_by_number_or_place(tmp_path: Path) -> None:
    first, again, other = (
        read(Adapters(), request(adapter(tmp_path / name, weights), number))
        for name, weights, number in (("a", b"one", 1), ("b", b"one", 2), ("c", b"two", 1))
    )
    assert first == again
    assert first != other
    assert first != Identity.of(request(), Adapters())


def test_requests_are_left_alone_until_their_adapter_is_read(tmp_path: Path) -> None:
    adapters = Adapters()
    asked = request(adapter(tmp_path / "a", b"one"))
    assert Identity.of(asked, adapters) is None
    assert read(adapters, asked).lora is not None


def test_requests_whose_adapter_is_read_anew_are_left_alone(tmp_path: Path) -> None:
    adapters = Adapters()
    asked = request(adapter(tmp_path / "a", b"one"))
    assert read(adapters, asked).lora is not None
    asked.lora_request.load_inplace = True
    assert Identity.of(asked, adapters) is None


def advanced(state: RequestState, computed: int, scheduled: int, drafts: list[int] | None = None) -> int:
    state.advance(computed, scheduled, drafts)
    state.pages = list(range(100))
    return state.savable()


def test_drafts_are_not_saved_before_they_are_accepted() -> None:
    asked = request(all_token_ids=list(range(40)), num_prompt_tokens=40)
    state = RequestState(asked, Identity(), b"", 8)
    assert advanced(state, 0, 40) == 5
    asked.all_token_ids.append(40)
    assert advanced(state, 40, 8, [1] * 7) == 5
    # Four drafts and the token after them were accepted: of 46 tokens the last is not computed yet.
    asked.all_token_ids.extend(range(41, 46))
    assert advanced(state, 45, 8, [1] * 7) == 5
    asked.all_token_ids.extend(range(46, 49))
    assert advanced(state, 48, 8, [1] * 7) == 6


def test_after_a_pause_tokens_count_only_when_they_are_computed_again() -> None:
    asked = request(all_token_ids=list(range(72)), num_prompt_tokens=16)
    state = RequestState(asked, Identity(), b"", 8)
    assert advanced(state, 70, 4, [1] * 3) == 8
    # Paused, its pages gone, then taken up again in pieces that end inside of a block.
    assert advanced(state, 0, 20) == 2
    assert advanced(state, 20, 20) == 5
    assert advanced(state, 40, 32) == 8
