"""What a node does for the bucket in the background, and what it counts of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvtier._counters import Counters
from kvtier.errors import TierUnavailable
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.heat import load_heat
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.upkeep import Upkeep
from tests.s3_support import NAMESPACE, WINDOW, FakeBucket, eventually
from tests.s3_tier_support import fail_with

KEYS = Keys("p", NAMESPACE.hex)
BLOCK = bytes(16)


class Node:
    """An upkeep without its thread, and all that it has to do with."""

    def __init__(self) -> None:
        self.bucket, self.counters, self.breaker = FakeBucket(), Counters(), Breaker()
        self.upkeep = Upkeep(
            self.bucket,
            KEYS,
            "p",
            NAMESPACE.id,
            Health("writing", self.breaker, self.counters),
            self.counters,
            ttl=None,
            quota=None,
            window=WINDOW,
        )

    def counts(self) -> tuple[float, float]:
        found = self.counters.snapshot()
        return found.get("heat_summaries_written", 0), found.get("heat_failed", 0)

    def uses(self) -> dict[bytes, float]:
        return {name: use.count for name, use in load_heat(self.bucket, KEYS, NAMESPACE.id)[0].items()}


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    yield made
    made.upkeep.close(10)


def test_summaries_are_counted_where_there_was_something_to_write(node: Node) -> None:
    node.upkeep.write_heat()
    assert node.counts() == (0, 0)
    assert node.bucket.objects == {}
    for written in (1, 2):
        node.upkeep.heat.note(BLOCK)
        node.upkeep.write_heat()
        assert node.counts() == (written, 0)
        assert node.uses()[BLOCK] == pytest.approx(written, rel=1e-3)


def test_nothing_is_written_to_a_bucket_that_takes_nothing_until_it_does(node: Node) -> None:
    node.breaker.failure(denied=True)
    node.upkeep.heat.note(BLOCK)
    node.upkeep.write_heat()
    assert (node.counts(), node.bucket.requests) == ((0, 0), [])
    node.breaker.success()
    node.upkeep.write_heat()
    assert (node.counts(), node.uses()) == ((1, 0), {BLOCK: 1.0})


@pytest.mark.parametrize("error", [TierUnavailable("down"), ZeroDivisionError("a defect")], ids=repr)
def test_a_summary_that_cannot_be_written_is_lost_and_the_thread_goes_on(
    node: Node, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtier.tiers.s3.upkeep.HEAT_SECONDS", 0.01)
    node.bucket.before = fail_with(error)
    node.upkeep.heat.note(BLOCK)
    node.upkeep.start()
    eventually(lambda: node.counts() == (0, 1))
    node.bucket.before = lambda kind, key: None
    node.upkeep.heat.note(BLOCK)
    eventually(lambda: node.counts() == (1, 1))
    assert node.uses() == {BLOCK: 1.0}
