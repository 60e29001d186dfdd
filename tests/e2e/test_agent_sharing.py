"""Several engines on one agent: one fetch, one copy in memory, fair shares, namespaces apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kvtier.agent import wire
from tests.agent_support import AgentThread, Place, eventually, namespace_of
from tests.store_support import DictTier, chain, content, read, save

BLOCKS = 6


@pytest.fixture
def place() -> Iterator[Place]:
    place = Place(16 * 4096)
    yield place
    place.remove()


def test_engines_that_want_the_same_blocks_at_once_share_one_fetch_and_one_copy(place):
    tier = DictTier()
    with AgentThread(place, [tier]):
        client = place.connect()
        assert save(client, chain(BLOCKS)) == BLOCKS
        client.close(20)
    assert len(tier.blocks) == BLOCKS
    tier.open.clear()
    with AgentThread(place, [tier]) as agent:
        clients = [place.connect() for _ in range(4)]
        found = [None] * len(clients)

        def look(number: int) -> None:
            found[number] = clients[number].match(chain(BLOCKS), wait=20)

        threads = [threading.Thread(target=look, args=(number,)) for number in range(len(clients))]
        for thread in threads:
            thread.start()
        eventually(lambda: agent.agent._waiting == len(clients), "all of them wait")
        tier.open.set()
        for thread in threads:
            thread.join(60)
        assert sorted(tier.reads) == sorted(chain(BLOCKS))
        assert len({match.slots for match in found}) == 1
        assert len({match.lease for match in found}) == len(clients)
        for client, match in zip(clients, found, strict=True):
            assert read(client, match.slots) == [content(block) for block in chain(BLOCKS)]
        assert clients[0].stats()["memory_blocks"] == BLOCKS
        for client in clients:
            client.close(1)


def test_namespaces_are_apart_and_have_equal_shares(place):
    with AgentThread(place) as agent:
        first, second = place.connect(namespace_of(model=1)), place.connect(namespace_of(model=2))
        # The hashes are equal here, which those of two namespaces never are.
        assert save(first, chain(4)) == 4
        assert second.match(chain(4)).slots == ()
        assert save(second, chain(4)) == 4
        ours, theirs = first.match(chain(4)), second.match(chain(4))
        assert not {slot & 0xFFFFFFFF for slot in ours.slots} & {slot & 0xFFFFFFFF for slot in theirs.slots}
        # Another engine of the first namespace takes nothing from the second.
        third = place.connect(namespace_of(model=1))
        assert [opened.store.memory.slots for opened in agent.stores.open_stores()] == [8, 8]
        assert save(third, chain(16, seed=3)) == 8 - len(ours.slots)
        assert len(second.match(chain(4)).slots) == 4
        for client in (first, second, third):
            client.close(1)


def test_an_engine_that_asks_without_end_does_not_keep_another_waiting(place):
    """The loop takes one request of each in turn; if it took all of one first, it would never end."""
    with AgentThread(place) as agent:
        greedy, modest = place.connect(), place.connect()
        over = threading.Event()
        hashes = b"".join(chain(2000))

        def ask() -> None:
            while not over.is_set():
                # As many as the sockets hold, and no look at the answers.
                if len(greedy._link._posts) < 100:
                    greedy._link.ask(wire.MatchBlocks(0, 0, hashes, 0.0))
                    greedy._link._send_on()

        flood = threading.Thread(target=ask)
        flood.start()
        eventually(lambda: greedy._link._posts, "the agent cannot keep up")
        try:
            for seed in range(10):
                assert save(modest, chain(1, seed=seed)) == 1
                assert len(modest.match(chain(1, seed=seed)).slots) == 1
            assert "client_timeouts" not in modest.stats()
        finally:
            over.set()
            flood.join(60)
        assert agent.agent.counters.snapshot().get("bad_messages", 0) == 0
        greedy.close(1)
        modest.close(1)


def test_engines_of_one_namespace_evict_what_was_not_used_for_longest_whoever_saved_it(place):
    """One copy serves all, so a block belongs to no engine: what one of them uses stays for the other."""
    with AgentThread(place):
        first, second = place.connect(), place.connect()
        assert save(first, chain(4)) == 4
        # What it has committed it also says before it asks something.
        assert len(first.match(chain(4)).slots) == 4
        for seed in range(1, 9):
            # The second engine has not saved these, and keeps them by using them.
            match = second.match(chain(4))
            assert len(match.slots) == 4
            second.release(match.lease)
            assert save(first, chain(4, seed=seed)) == 4
        first.close(1)
        second.close(1)
