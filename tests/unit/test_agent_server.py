"""The agent's sockets: who is let in, who is answered, what hostile or dead clients leave behind."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request

import msgspec
import pytest

from kvtier.agent import dialler, http, reservations, wire
from kvtier.agent.client import AgentClient, Deadlines
from kvtier.agent.http import HealthServer
from kvtier.codec import BlockCodec
from kvtier.layout import BlockLayout
from kvtier.store import ticket_slot
from tests.agent_support import TWO_SHARDS, AgentThread, Place, eventually, namespace_of
from tests.store_support import LAYOUT, ROOT, DictTier, chain, content, read, save


def store_of(agent: AgentThread):
    (opened,) = agent.stores.open_stores()
    return opened.store


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


class TestLateAnswers:
    """The agent answers, but after the deadline."""

    @pytest.fixture
    def slow(self, place, agent):
        """A client of little patience, and a switch that keeps the agent from answering."""
        client = place.connect()
        gate = threading.Event()
        gate.set()
        desk = agent.agent._desk
        answer = desk.answer

        def held(session, request):
            gate.wait(60)
            return answer(session, request)

        desk.answer = held
        client._deadlines = Deadlines(0.02, 0.02)
        yield client, gate
        gate.set()
        client.close(5)

    def test_one_call_waits_and_the_others_do_not(self, slow):
        client, gate = slow
        save(client, chain(2))
        gate.clear()
        assert client.match(chain(2), wait=0).slots == ()
        # A call that waited now would do so for longer than the test may take.
        client._deadlines = Deadlines(1000.0, 1000.0)
        for _ in range(50):
            assert client.match(chain(2)).slots == ()
            assert client.reserve(ROOT, 0, chain(1, seed=1)) == [None]
            assert client.hold(1) == 0.0
            client.release(1)
            client.commit([1])
            client.abort([1])
        assert client.stats()["client_timeouts"] == 1
        with client._link._lock:
            # As while the client's thread asks the agent how it is.
            assert client.match(chain(2)).slots == ()
            client.release(1)
        gate.set()
        eventually(lambda: client.connected)
        assert read(client, client.match(chain(2)).slots) == [content(block) for block in chain(2)]

    def test_a_late_lease_is_released_and_never_another_calls_answer(self, slow, agent):
        client, gate = slow
        save(client, chain(2))
        save(client, chain(3, seed=1))
        gate.clear()
        assert client.match(chain(2), wait=0).slots == ()
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        match = client.match(chain(3, seed=1))
        assert read(client, match.slots) == [content(block) for block in chain(3, seed=1)]
        eventually(lambda: client.stats()["client_late_replies"] == 1)
        eventually(lambda: client.stats()["leases"] == 1)
        client.release(match.lease)
        assert client.stats()["leases"] == 0
        assert store_of(agent).stats()["memory_pinned"] == 0

    def test_late_tickets_are_aborted(self, slow, agent, monkeypatch):
        client, gate = slow
        monkeypatch.setattr(reservations, "RESERVED_SECONDS", 0.1)
        gate.clear()
        assert client.reserve(ROOT, 0, chain(16)) == [None] * 16
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        eventually(lambda: client.stats().get("client_untaken_reservations") == 1)
        eventually(lambda: client.stats()["filling_slots"] == 0)
        assert save(client, chain(16, seed=1)) == 16

    def test_commits_and_releases_made_meanwhile_are_not_lost(self, slow):
        client, gate = slow
        save(client, chain(1))
        client._deadlines = Deadlines(20.0, 20.0)
        match = client.match(chain(1))
        tickets = client.reserve(ROOT, 0, chain(2, seed=1))
        client._deadlines = Deadlines(0.02, 0.02)
        gate.clear()
        assert client.match(chain(1), wait=0).slots == ()
        client.commit(tickets)
        client.release(match.lease)
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        eventually(lambda: client.stats()["leases"] == 0)
        assert len(client.match(chain(2, seed=1)).slots) == 2

    def test_a_lease_is_used_without_an_answer_while_it_is_certain(self, slow):
        client, gate = slow
        now = [0.0]
        client._clock = lambda: now[0]
        client._deadlines = Deadlines(20.0, 20.0)
        save(client, chain(1))
        match = client.match(chain(1))
        gate.clear()
        client._deadlines = Deadlines(0.02, 0.02)
        now[0] = 29.0
        assert client.hold(match.lease) == 60.0
        assert client.hold(match.lease + 1) == 0.0
        now[0] = 31.0
        assert client.hold(match.lease) == 0.0


class TestWaiting:
    def fill(self, hashes):
        tier, codec = DictTier("disk"), BlockCodec(LAYOUT, namespace_of().id)
        tier.blocks = {block: bytes(codec.encode(block, content(block))) for block in hashes}
        return tier

    def test_a_lookup_that_waits_holds_nobody_up(self, place):
        tier = self.fill(chain(3))
        tier.open.clear()
        with AgentThread(place, [tier]):
            waiting, other = place.connect(), place.connect()
            save(other, chain(2, seed=1))
            found = []
            thread = threading.Thread(target=lambda: found.append(waiting.match(chain(3), wait=30)))
            thread.start()
            eventually(lambda: tier.reads)
            # Both another client and another thread of the same one.
            assert len(other.match(chain(2, seed=1), wait=30).slots) == 2
            waiting.release(other.match(chain(2, seed=1)).lease)
            assert thread.is_alive()
            tier.open.set()
            thread.join(30)
            assert read(waiting, found[0].slots) == [content(block) for block in chain(3)]
            waiting.close(1)
            other.close(1)

    def test_a_lease_that_comes_while_nobody_calls_is_released(self, place):
        tier = self.fill(chain(3))
        tier.open.clear()
        with AgentThread(place, [tier]) as agent:
            client = place.connect()
            # It gives up before the lookup does.
            client._deadlines = Deadlines(match=-29.9, call=20.0)
            assert client.match(chain(3), wait=30).slots == ()
            eventually(lambda: client.connected)
            tier.open.set()
            store = store_of(agent)
            eventually(lambda: client._counters.snapshot().get("client_late_replies"))
            eventually(lambda: store.stats()["leases"] == 0)
            client.close(1)

    def test_an_engine_that_dies_while_its_lookup_waits_leaves_no_lease(self, place):
        tier = self.fill(chain(3))
        tier.open.clear()
        with AgentThread(place, [tier]) as agent:
            client = place.connect()
            thread = threading.Thread(target=lambda: client.match(chain(3), wait=30))
            thread.start()
            eventually(lambda: tier.reads)
            connection = client._link._connection
            connection.door.shutdown(socket.SHUT_RDWR)
            eventually(lambda: agent.agent.sessions.find(connection.session) is None)
            store = store_of(agent)
            tier.open.set()
            eventually(lambda: store.stats()["memory_blocks"] == 3)
            thread.join(30)
            eventually(lambda: store.stats()["leases"] == 0 and store.stats()["memory_pinned"] == 0)
            client.close(1)

    def test_more_lookups_than_can_wait_are_answered_without_waiting(self, place, monkeypatch):
        monkeypatch.setattr("kvtier.agent.server.WAITERS", 1)
        tier = self.fill(chain(3))
        tier.open.clear()
        with AgentThread(place, [tier]):
            first, second = place.connect(), place.connect()
            thread = threading.Thread(target=lambda: first.match(chain(3), wait=20))
            thread.start()
            eventually(lambda: tier.reads)
            assert second.match(chain(3), wait=20).slots == ()
            assert thread.is_alive()
            tier.open.set()
            thread.join(30)
            first.close(1)
            second.close(1)

    def test_what_was_committed_is_written_before_the_agent_ends(self, place):
        tier = DictTier("disk")
        agent = AgentThread(place, [tier])
        client = place.connect()
        save(client, chain(8))
        client.stats()
        agent.end()
        assert set(tier.blocks) == set(chain(8))
        client.close(1)


class TestHealth:
    @pytest.fixture
    def get(self, agent):
        server = HealthServer(agent.agent, None)

        def get(path):
            try:
                with urllib.request.urlopen(f"http://{server.address}{path}", timeout=30) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        yield get
        server.close()

    def test_metrics_are_told_by_namespace(self, place, agent, get):
        client = place.connect()
        save(client, chain(3))
        client.match(chain(3))
        status, text = get("/metrics")
        assert status == 200
        lines = text.splitlines()
        assert f'kvtier_saved_blocks{{namespace="{namespace_of().hex}"}} 3.0' in lines
        assert f'kvtier_memory_slots{{namespace="{namespace_of().hex}"}} 16.0' in lines
        assert "kvtier_agent_clients 1.0" in lines
        assert "kvtier_agent_stores 1.0" in lines
        client.close(1)

    def test_health(self, agent, get, monkeypatch):
        assert get("/healthz") == (200, "alive\n")
        assert get("/readyz") == (200, "ready\n")
        assert get("/")[0] == 404
        monkeypatch.setattr(http, "STALE_SECONDS", -1.0)
        assert get("/healthz")[0] == 503
        assert get("/readyz")[0] == 503

    def test_an_agent_that_ends_is_alive_and_not_ready(self, agent, get):
        agent.agent._stopping.set()
        assert get("/readyz")[0] == 503


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


def test_messages_are_arrays_that_begin_with_their_name():
    message = wire.encode(wire.MatchBlocks(1, 2, b"h" * 16, 0.5))
    assert msgspec.msgpack.decode(message) == ["match", 1, 2, b"h" * 16, 0.5, 0.0, 0.0]
