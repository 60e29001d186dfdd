"""LoRA adapters are told apart by what is in their files, not by the number that an engine gives them."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from kvtier.connector import adapters as module
from kvtier.connector.adapters import Adapters
from tests.trtllm_support import SIZE, FakeRequest, make_rig, memory_stores, write_config

PROMPT = list(range(100, 100 + 5 * SIZE))


def make_adapter(place: Path, weight: bytes, rank: int = 8) -> str:
    place.mkdir()
    (place / "adapter_model.safetensors").write_bytes(weight)
    (place / "adapter_config.json").write_text(f'{{"r": {rank}}}')
    (place / "README.md").write_text(place.name)
    return str(place)


def named(adapters: Adapters, lora_id: int, path: str | None) -> str | None:
    """Return the name once the adapter's files have been read."""
    adapters.name(lora_id, path)
    for digest in list(adapters._digests.values()):
        digest.exception(30)
    return adapters.name(lora_id, path)


def test_an_adapter_has_one_name_wherever_it_lies_and_whatever_its_number(tmp_path):
    first = make_adapter(tmp_path / "a", b"weights")
    second = make_adapter(tmp_path / "b", b"weights")
    name = named(Adapters(), 1, first)
    assert name is not None
    assert name == named(Adapters(), 7, second)


@pytest.mark.parametrize("change", ["weights", "config"])
def test_adapters_with_the_same_number_and_other_content_have_other_names(tmp_path, change):
    first = make_adapter(tmp_path / "a", b"weights")
    second = make_adapter(
        tmp_path / "b", b"weight5" if change == "weights" else b"weights", 9 if change == "config" else 8
    )
    assert named(Adapters(), 1, first) != named(Adapters(), 1, second)


def test_an_adapter_that_was_replaced_in_place_has_another_name_in_the_next_process(tmp_path):
    adapter = make_adapter(tmp_path / "a", b"weights")
    before = named(Adapters(), 1, adapter)
    shutil.rmtree(adapter)
    make_adapter(tmp_path / "a", b"WEIGHTS")
    assert named(Adapters(), 1, adapter) not in (None, before)


def test_a_number_whose_path_was_told_needs_none(tmp_path):
    adapters, path = Adapters(), make_adapter(tmp_path / "a", b"weights")
    before = adapters.name(1, None)
    name = named(adapters, 1, path)
    assert before != name == adapters.name(1, None)


@pytest.mark.parametrize("path", [None, "missing", "empty"])
def test_an_adapter_that_cannot_be_read_is_private_to_its_engine(tmp_path, path):
    (tmp_path / "empty").mkdir()
    place = None if path is None else str(tmp_path / path)
    here, there = Adapters(), Adapters()
    assert named(here, 1, place) == here.name(1, place) is not None
    assert len({named(here, 1, place), named(here, 2, place), named(there, 1, place)}) == 3


def test_a_number_of_two_adapters_has_no_name_any_more(tmp_path):
    adapters = Adapters()
    paths = [make_adapter(tmp_path / name, name.encode()) for name in ("a", "b")]
    assert named(adapters, 1, paths[0]) is not None
    assert named(adapters, 1, paths[1]) is None
    assert named(adapters, 1, paths[0]) is None
    assert named(adapters, 2, paths[1]) is not None


def test_nobody_waits_for_an_adapter_to_be_read(tmp_path, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(module, "adapter_digest", lambda path: gate.wait(30) and "digest")
    adapters = Adapters()
    assert adapters.name(1, "somewhere") is None
    assert adapters.name(1, None) is None
    gate.set()
    assert named(adapters, 1, None) == "digest"


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path)))


def test_engines_share_what_the_same_adapter_made_and_nothing_else(tmp_path, monkeypatch):
    """Each has its own number for each adapter, and V1's lookups do not tell a path."""
    paths = {name: make_adapter(tmp_path / name, name[:1].encode()) for name in ("a", "a again", "b")}
    with memory_stores(monkeypatch, slots=64):
        rigs = [make_rig(), make_rig()]
        assert rigs[0].store is rigs[1].store

        def serve(rig, name, lora_id, request_id):
            lookup = FakeRequest(request_id, [*PROMPT, 7], lora_task_id=lora_id)
            promised, _ = rig.leader.get_num_new_matched_tokens(lookup, 0)
            request = FakeRequest(request_id, [*PROMPT, 7], lora_task_id=lora_id, py_lora_path=paths[name])
            rig.leader.update_state_after_alloc(request, list(range(6)))
            rig.iterate(new=[rig.data(request, request.tokens, range(6), 0, len(request.tokens) - promised)])
            rig.finish(request, list(range(6)))
            for digest in rig.leader._adapters._digests.values():
                digest.result(30)
            return promised

        assert [serve(rigs[0], "a", 1, request_id) for request_id in (1, 2, 3)] == [0, 0, 5 * SIZE]
        assert [serve(rigs[1], "b", 1, request_id) for request_id in (1, 2, 3)] == [0, 0, 5 * SIZE]
        assert [serve(rigs[1], "a again", 2, request_id) for request_id in (4, 5)] == [0, 5 * SIZE]
        assert rigs[0].matched([*PROMPT, 7]) == 0
