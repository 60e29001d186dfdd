"""The agent and its engines: who is promised what, and what they leave behind."""

from __future__ import annotations

import threading

import pytest

from kvtier.agent import dialler, wire
from kvtier.agent.client import AgentClient
from kvtier.layout import BlockLayout
from kvtier.store import ticket_slot
from tests.agent_support import TWO_SHARDS, AgentThread, Place, eventually, namespace_of, store_of
from tests.store_support import LAYOUT, ROOT, chain, content, read, save


def engine(place: Place, ranks: int, layout: BlockLayout, group: str = "engine") -> list[AgentClient]:
    clients = [place.connect(layout=layout, group=group, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert all(client.connected for client in clients)
    return clients


class TestEngines:
    def test_nothing_is_promised_until_all_ranks_are_there(self, place, agent):
        first = place.connect(group="engine", rank=0, ranks=2)
        assert first.reserve(ROOT, 0, chain(2)) == [None, None]
        store = store_of(agent)
        save(store, chain(2))
        assert first.match(chain(2)).slots == ()
        second = place.connect(group="engine", rank=1, ranks=2)
        assert len(first.match(chain(2)).slots) == 2
        second.close(1)
        eventually(lambda: first.match(chain(2)).slots == ())
        first.close(1)

    def test_ranks_fill_and_read_the_same_slots(self, place, agent):
        ranks = engine(place, 2, TWO_SHARDS)
        hashes = chain(3)
        tickets = ranks[0].reserve(ROOT, 0, hashes)
        for rank, client in enumerate(ranks):
            for block, ticket in zip(hashes, tickets, strict=True):
                whole = content(block, TWO_SHARDS.block_bytes)
                half = len(whole) // 2
                client.slot_view(ticket_slot(ticket), rank)[:] = whole[rank * half : (rank + 1) * half]
            assert ranks[0].match(hashes).slots == ()
            client.commit(tickets, rank)
        eventually(lambda: len(ranks[0].match(hashes).slots) == 3)
        match = ranks[0].match(hashes)
        for client in ranks:
            assert read(client, match.slots) == [content(block, TWO_SHARDS.block_bytes) for block in hashes]
            client.close(1)

    @pytest.mark.parametrize(
        "layout", [LAYOUT, TWO_SHARDS], ids=["stored once for all ranks", "a shard each"]
    )
    def test_a_lease_ends_when_every_rank_has_released_it(self, place, agent, layout):
        ranks = engine(place, 2, layout)
        save(store_of(agent), chain(2))
        match = ranks[0].match(chain(2))
        assert match.lease
        ranks[0].release(match.lease, 0)
        ranks[0].release(match.lease, 0)
        assert ranks[0].stats()["leases"] == 1
        ranks[1].release(match.lease, 1)
        assert ranks[1].stats()["leases"] == 0
        for client in ranks:
            client.close(1)

    def test_what_an_engine_holds_is_freed_when_its_last_process_is_gone(self, place, agent):
        ranks = engine(place, 2, LAYOUT)
        store = store_of(agent)
        save(store, chain(4))
        assert ranks[0].match(chain(4)).lease
        assert None not in ranks[0].reserve(ROOT, 0, chain(3, seed=1))
        ranks[1].close(1)
        eventually(lambda: len(agent.agent.sessions) == 1)
        # The process that is left may still copy.
        assert (store.stats()["leases"], store.stats()["filling_slots"]) == (1, 3)
        ranks[0].close(1)
        eventually(lambda: store.stats()["leases"] == 0 and store.stats()["filling_slots"] == 0)
        assert store.stats()["memory_pinned"] == 0

    def test_engines_of_one_namespace_share_blocks_and_not_their_holdings(self, place, agent):
        first, second = place.connect(), place.connect()
        assert save(first, chain(4)) == 4
        match = first.match(chain(4))
        assert second.match(chain(4)).slots == match.slots
        assert read(second, match.slots) == [content(block) for block in chain(4)]
        tickets = first.reserve(ROOT, 0, chain(2, seed=1))
        assert None not in second.reserve(ROOT, 0, chain(3, seed=2))
        second.close(1)
        store = store_of(agent)
        eventually(lambda: (store.stats()["leases"], store.stats()["filling_slots"]) == (1, 2))
        first.commit(tickets)
        assert len(first.match(chain(2, seed=1)).slots) == 2
        first.close(1)

    def test_an_engines_numbers_mean_nothing_when_another_names_them(self, place, agent):
        own, other = place.connect(), place.connect()
        save(own, chain(3))
        match, tickets = own.match(chain(3)), own.reserve(ROOT, 0, chain(2, seed=1))
        assert other.hold(match.lease) == 0.0
        assert own.hold(match.lease) > 0.0
        for shard in (None, 0):
            other.release(match.lease, shard)
            other.abort(tickets, shard)
        other.commit(tickets)
        stats = other.stats()
        assert (stats["leases"], stats["filling_slots"]) == (1, 2)
        assert own.match(chain(2, seed=1)).slots == ()
        own.commit(tickets)
        assert len(own.match(chain(2, seed=1)).slots) == 2
        for client in (own, other):
            client.close(1)

    def test_what_a_rank_says_before_it_knows_that_it_is_let_in_counts(self, place, agent, monkeypatch):
        leader = place.connect(group="engine", rank=0, ranks=2)
        eventually(lambda: leader.connected)
        ranks = []

        def slowly(*arguments):
            connection = attach(*arguments)
            # The agent knows both ranks from here on, and serves the leader.
            eventually(lambda: ranks)
            assert save(leader, chain(2)) == 2
            match = leader.match(chain(2))
            leader.release(match.lease, 0)
            ranks[0].release(match.lease, 1)
            return connection

        attach = dialler.attach
        monkeypatch.setattr(dialler, "attach", slowly)
        ranks.append(place.connect(group="engine", rank=1, ranks=2, wait=0))
        eventually(lambda: ranks[0].connected)
        eventually(lambda: leader.stats().get("leases") == 0, "both have released it")
        ranks[0].close(1)
        leader.close(1)

    def test_a_namespace_that_nobody_uses_any_more_leaves_its_memory_to_the_next(self, place, agent):
        place.connect(namespace_of(a=1)).close(1)
        eventually(lambda: len(agent.agent.sessions) == 0)
        client = place.connect(namespace_of(a=2))
        assert save(client, chain(16)) == 16
        # The commits have arrived when this is answered: what is still being filled would leave later.
        client.stats()
        other = place.connect(namespace_of(a=3))
        assert save(other, chain(16, seed=1)) == 8
        assert len(client.match(chain(16)).slots) == 8
        client.close(1)
        other.close(1)

    def test_ranks_that_disagree_about_their_number_are_refused(self, place, agent, caplog):
        first = place.connect(group="engine", rank=0, ranks=2)
        second = place.connect(group="engine", rank=1, ranks=3, wait=0)
        eventually(lambda: "joins an engine of 2 ranks" in caplog.text)
        second.close(1)
        first.close(1)


def test_many_clients_at_once(place):
    failures = []

    def engine(number: int) -> None:
        try:
            client = place.connect()
            hashes = chain(1, seed=number % 8)
            for _ in range(10):
                save(client, hashes)
                match = client.match(hashes)
                if match.slots and read(client, match.slots) != [content(block) for block in hashes]:
                    failures.append((number, "wrong bytes"))
                client.release(match.lease)
            client.close(5)
        except Exception as error:
            failures.append((number, error))

    with AgentThread(place) as agent:
        threads = [threading.Thread(target=engine, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failures == []
        eventually(lambda: len(agent.agent.sessions) == 0)
        stats = store_of(agent).stats()
        assert (stats["leases"], stats["filling_slots"], stats["memory_pinned"]) == (0, 0, 0)
        assert agent.agent.counters.snapshot() == {}


def test_an_agent_that_an_engine_started_ends_after_the_last_client(place):
    agent = AgentThread(place, linger=0.3)
    client = place.connect()
    assert save(client, chain(1)) == 1
    assert not agent.agent.stopping
    client.close(1)
    agent.thread.join(60)
    assert not agent.thread.is_alive()
    assert not (place.directory / wire.DOOR).exists()
    agent.end()
