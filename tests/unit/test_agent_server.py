"""The agent's sockets: who is let in, who is answered, what hostile or dead clients leave behind."""

from __future__ import annotations

import logging
import os
import socket
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress

import msgspec
import pytest
import zmq

from kvtier.agent import client as client_module
from kvtier.agent import connection, door, http, wire
from kvtier.agent.client import AgentClient, Deadlines
from kvtier.agent.http import HealthServer
from kvtier.agent.link import State
from kvtier.codec import BlockCodec
from kvtier.layout import BlockLayout
from kvtier.store import ticket_slot
from tests.agent_support import AgentThread, Place, eventually, namespace_of
from tests.store_support import LAYOUT, ROOT, DictTier, chain, content, read, save

TWO_SHARDS = BlockLayout("bfloat16", tokens_per_block=4, layers=2, kv_factor=2, row_elements=64, shards=2)


@pytest.fixture(autouse=True)
def told_anew(monkeypatch):
    """Let each test see messages that are told once a minute."""
    monkeypatch.setattr("kvtier._logging._last", {})


@pytest.fixture
def place():
    place = Place()
    yield place
    place.remove()


@pytest.fixture
def agent(place):
    with AgentThread(place) as agent:
        yield agent


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

    def test_a_namespace_that_nobody_uses_any_more_leaves_its_memory_to_the_next(self, place, agent):
        place.connect(namespace_of(a=1)).close(1)
        eventually(lambda: len(agent.agent.sessions) == 0)
        client = place.connect(namespace_of(a=2))
        assert save(client, chain(16)) == 16
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
            assert not client.renew(1)
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

    def test_late_tickets_are_aborted(self, slow, agent):
        client, gate = slow
        gate.clear()
        assert client.reserve(ROOT, 0, chain(16)) == [None] * 16
        gate.set()
        eventually(lambda: client.connected)
        client._deadlines = Deadlines(20.0, 20.0)
        eventually(lambda: client.stats()["filling_slots"] == 0 and client.stats()["client_late_replies"])
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

    def test_a_lease_counts_as_renewed_while_it_holds_for_certain(self, slow):
        client, gate = slow
        now = [0.0]
        client._clock = lambda: now[0]
        client._deadlines = Deadlines(20.0, 20.0)
        save(client, chain(1))
        match = client.match(chain(1))
        gate.clear()
        client._deadlines = Deadlines(0.02, 0.02)
        now[0] = 29.0
        assert client.renew(match.lease)
        assert not client.renew(match.lease + 1)
        now[0] = 31.0
        assert not client.renew(match.lease)


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


@contextmanager
def raw_desk(place: Place):
    """A ZeroMQ socket at the desk."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as desk:
        desk.setsockopt(zmq.LINGER, 1000)
        desk.connect(f"ipc://{place.directory / wire.DESK}")
        yield desk


class TestHostility:
    def bad(self, agent):
        return agent.agent.counters.snapshot().get("bad_messages", 0)

    @pytest.mark.parametrize(
        "parts",
        [
            [b""],
            [b"\xc1"],
            [b"GET / HTTP/1.1\r\n\r\n"],
            [b"\x91" * 10_000],
            [wire.encode(wire.Ping(1, 1))],
            [wire.encode(wire.Ping(1, 1)), b"more"],
            [wire.encode(wire.Release(2**64 - 1, 0, 1, -1))],
        ],
        ids=range(7),
    )
    def test_messages_that_are_none_are_counted_and_dropped(self, place, agent, parts):
        client = place.connect()
        with raw_desk(place) as desk:
            desk.send_multipart(parts)
            eventually(lambda: self.bad(agent) == 1)
        assert save(client, chain(2)) == 2
        assert len(client.match(chain(2)).slots) == 2
        client.close(1)

    def test_a_message_that_is_too_long_ends_only_its_sender(self, place, agent):
        client = place.connect()
        with raw_desk(place) as desk:
            desk.send(bytes(wire.MAX_MESSAGE_BYTES + 1))
        assert save(client, chain(2)) == 2
        client.close(1)

    @pytest.mark.parametrize(
        "build",
        [
            lambda token: wire.Commit(token, 0, wire.pack_numbers([1], "Q"), 1),
            lambda token: wire.Commit(token, 0, wire.pack_numbers([1], "Q"), -1),
            lambda token: wire.Commit(token, 0, b"123", 0),
            lambda token: wire.Abort(token, 0, b"123"),
            lambda token: wire.MatchBlocks(token, 1, b"short", 0.0),
            lambda token: wire.Reserve(token, 1, b"short", 0, b""),
            lambda token: wire.Reserve(token, 1, bytes(16), -1, b""),
        ],
        ids=range(7),
    )
    def test_requests_that_make_no_sense_are_counted_and_dropped(self, place, agent, build):
        client = place.connect()
        (session,) = agent.agent.sessions._by_token.values()
        with raw_desk(place) as desk:
            desk.send(wire.encode(build(session.token)))
            eventually(lambda: self.bad(agent) == 1)
        assert save(client, chain(2)) == 2
        client.close(1)

    def test_a_commit_of_a_shard_that_is_none_publishes_nothing(self, place, agent):
        client = place.connect(layout=TWO_SHARDS)
        tickets = client.reserve(ROOT, 0, chain(1))
        client.commit(tickets, 0)
        client.commit(tickets, 7)
        assert client.match(chain(1)).slots == ()
        client.close(1)

    @pytest.mark.parametrize(
        "hello",
        [
            b"",
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"kvtA\x01\x00\x00\x00\xff\xff\xff\xff",
            wire.frame(wire.Refused("me")),
            wire.frame(wire.Attach(b"{}", bytes(16), LAYOUT.describe(), "g", 0, 1)),
            wire.frame(wire.Attach(b"[1]", bytes(16), LAYOUT.describe(), "g", 0, 1)),
            wire.frame(wire.Attach(b"{", bytes(16), LAYOUT.describe(), "g", 0, 1)),
            wire.frame(wire.Attach(b"{}", bytes(16), {"layers": 2**62}, "g", 0, 1)),
            wire.frame(wire.Attach(b"{}", namespace_of().id, LAYOUT.describe(), "g", 5, 1)),
            b"kvtA\x01\x00\x00\x00\x05\x00\x00\x00" + b"\xc1" * 5,
        ],
        ids=range(10),
    )
    def test_clients_that_are_none_are_refused(self, place, agent, hello):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(place.directory / wire.DOOR))
            caller.sendall(hello)
            caller.shutdown(socket.SHUT_WR)
            caller.settimeout(30)
            answer = b""
            # It closes without reading all that was sent.
            with suppress(ConnectionResetError):
                while part := caller.recv(4096):
                    answer += part
        eventually(lambda: agent.agent.counters.snapshot().get("refused_clients") == 1)
        if answer:
            assert isinstance(wire.decode_answer(answer[wire.FRAME_HEADER_BYTES :]), wire.Refused)
        assert len(agent.agent.sessions) == 0
        place.connect().close(1)

    def test_a_client_that_says_nothing_is_not_waited_for_for_ever(self, place, agent, monkeypatch):
        monkeypatch.setattr(door, "HELLO_SECONDS", 0.05)
        silent = [socket.socket(socket.AF_UNIX) for _ in range(door.GREETERS + 2)]
        for caller in silent:
            caller.connect(str(place.directory / wire.DOOR))
        place.connect().close(1)
        for caller in silent:
            caller.close()

    def test_another_user_is_refused(self, place, agent, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        hello = wire.Attach(b"{}", bytes(16), LAYOUT.describe(), "g", 0, 1)
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(place.directory / wire.DOOR))
            caller.sendall(wire.frame(hello))
            caller.settimeout(30)
            answer = wire.decode_answer(door.receive_frame(caller))
        assert "runs as user" in answer.reason

    def test_an_agent_of_another_user_is_not_trusted(self, place, monkeypatch, caplog):
        def other_user():
            return os.getuid() + (threading.current_thread().name == "kvtier-agent-link")

        with AgentThread(place) as agent:
            monkeypatch.setattr(connection, "check_directory", lambda directory: None)
            monkeypatch.setattr(os, "geteuid", other_user)
            client = place.connect(wait=0)
            eventually(lambda: "cannot attach" in caplog.text and "runs as user" in caplog.text)
            assert not client.connected
            assert len(agent.agent.sessions) == 0
            client.close(1)

    def test_sockets_that_others_may_have_put_there_are_not_trusted(self, place, agent, caplog):
        place.directory.chmod(0o777)
        client = place.connect(wait=0)
        eventually(lambda: "others may write" in caplog.text)
        assert not client.connected
        place.directory.chmod(0o700)
        assert client.wait_connected(60)
        client.close(1)

    def test_talk_on_the_door_after_the_handshake_is_ignored(self, place, agent):
        client = place.connect()
        client._link._connection.door.sendall(b"hello?")
        eventually(lambda: self.bad(agent) == 1)
        assert save(client, chain(2)) == 2
        client.close(1)


class TestVersions:
    def test_a_client_of_another_version_gets_a_clear_answer(self, place, agent, caplog):
        frame = bytearray(wire.frame(wire.Attach(b"future", b"", {}, "g", 0, 1)))
        frame[4] = 99
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(place.directory / wire.DOOR))
            caller.sendall(frame)
            caller.settimeout(30)
            payload = door.receive_frame(caller)
        answer = wire.decode_answer(payload)
        assert isinstance(answer, wire.Refused)
        assert f"protocol version 99 there, {wire.PROTOCOL_VERSION} here" in answer.reason
        assert answer.reason in caplog.text

    def test_an_agent_of_another_version_is_a_miss_and_told_once(self, place, caplog):
        caplog.set_level(logging.WARNING)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(place.directory / wire.DOOR))
        listener.listen()
        visits = []

        def future_agent():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(100_000)
                    connection.sendall(
                        b"kvtA" + (99).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"???"
                    )
                visits.append(1)

        thread = threading.Thread(target=future_agent, daemon=True)
        thread.start()
        client = place.connect(wait=0)
        eventually(lambda: len(visits) >= 3)
        assert not client.connected
        assert client.match(chain(2), wait=30).slots == ()
        assert client.reserve(ROOT, 0, chain(2)) == [None, None]
        assert caplog.text.count("speaks another protocol") == 1
        assert f"protocol version 99 there, {wire.PROTOCOL_VERSION} here" in caplog.text
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        (place.directory / wire.DOOR).unlink()
        with AgentThread(place):
            assert client.wait_connected(60)
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


def test_messages_have_the_numbers_that_the_protocol_says():
    """Whoever changes a message has to raise the version: these are the bytes of version 1."""
    assert wire.PROTOCOL_VERSION == 1
    message = wire.encode(wire.MatchBlocks(1, 2, b"h" * 16, 0.5))
    assert msgspec.msgpack.decode(message) == ["match", 1, 2, b"h" * 16, 0.5]
    assert client_module.LEASE_SECONDS == 60.0
    assert State.UP.value == "up"
