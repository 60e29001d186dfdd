"""Credentials at hand: who waits for new ones, and who goes on with those that are still good."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvtier.tiers.s3 import key_ring
from kvtier.tiers.s3.bucket import BucketTimeout
from kvtier.tiers.s3.key_ring import KeyRing
from kvtier.tiers.s3.waiting import run
from tests.s3_support import eventually

PATIENCE = 60.0


class Source:
    """Gives numbered keys; a test says when they expire, hang or fail."""

    def __init__(self) -> None:
        self.given = 0
        self.left = 3600.0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def refresh_needed(self, seconds: float | None = None) -> bool:
        return self.left < (900.0 if seconds is None else seconds)

    def get_frozen_credentials(self) -> str:
        self.given += 1
        assert self.gate.wait(PATIENCE)
        if self.error is not None:
            raise self.error
        self.left = 3600.0
        return f"keys {self.given}"


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.gate.set()


def get(ring: KeyRing, seconds: float = PATIENCE) -> object:
    return run(ring.get(seconds))


def test_many_wait_for_one_look_up(source: Source) -> None:
    source.gate.clear()
    ring, got = KeyRing(lambda: source), []
    threads = [threading.Thread(target=lambda: got.append(get(ring))) for _ in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: source.given)
    with pytest.raises(BucketTimeout, match="source of the credentials"):
        get(ring, 0.01)
    source.gate.set()
    for thread in threads:
        thread.join()
    assert got == ["keys 1"] * 8
    assert get(ring) == "keys 1"
    assert source.given == 1
    ring.close()


def test_what_is_still_good_is_used_while_it_is_renewed(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_ring, "_PAUSE_SECONDS", 0.0)
    ring = KeyRing(lambda: source)
    assert get(ring) == "keys 1"
    source.left = 600.0
    source.gate.clear()
    for _ in range(5):
        assert get(ring, 0.0) == "keys 1"
    eventually(lambda: source.given == 2)
    assert get(ring, 0.0) == "keys 1"
    source.gate.set()
    eventually(lambda: get(ring) == "keys 2")
    assert source.given == 2
    ring.close()


def test_what_expires_at_once_is_waited_for(source: Source) -> None:
    ring = KeyRing(lambda: source)
    assert get(ring) == "keys 1"
    source.left = 10.0
    assert get(ring) == "keys 2"
    source.left = 10.0
    source.gate.clear()
    with pytest.raises(BucketTimeout):
        get(ring, 0.01)
    source.gate.set()
    assert get(ring) == "keys 3"
    ring.close()


def test_a_renewal_that_fails_is_tried_again_but_not_at_once(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_ring, "_PAUSE_SECONDS", 3600.0)
    ring = KeyRing(lambda: source)
    assert get(ring) == get(ring) == "keys 1"
    ring._again_at = 0.0
    source.left, source.error = 600.0, RuntimeError("down")
    eventually(lambda: get(ring) == "keys 1" and ring._looking is None and source.given == 2)
    for _ in range(5):
        assert get(ring) == "keys 1"
    assert source.given == 2
    # Who cannot do without does not rest.
    source.left = 10.0
    with pytest.raises(RuntimeError, match="down"):
        get(ring)
    source.error = None
    assert get(ring) == "keys 4"
    ring.close()


def test_what_was_under_way_when_it_was_to_be_forgotten_is_not_used() -> None:
    old, new = Source(), Source()
    new.given = 10
    sources = [new, old]
    ring = KeyRing(lambda: sources.pop())
    old.gate.clear()
    with pytest.raises(BucketTimeout):
        get(ring, 0.01)
    eventually(lambda: old.given)
    ring.forget()
    assert get(ring) == "keys 11"
    old.gate.set()
    assert get(ring) == "keys 11"
    ring.close()


def test_keys_that_never_expire_are_looked_up_once_and_none_every_time() -> None:
    class Static:
        def get_frozen_credentials(self) -> str:
            return "static"

    found = [Static(), None, None]
    ring = KeyRing(lambda: found.pop())
    assert [get(ring) for _ in range(5)] == [None, None, "static", "static", "static"]
    ring.close()
