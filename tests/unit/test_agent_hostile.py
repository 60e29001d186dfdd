"""What is no client, no message, no agent of this version: counted and refused, and nothing else."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from contextlib import contextmanager, suppress

import pytest
import zmq

from kvtier.agent import connection, door, wire
from tests.agent_support import TWO_SHARDS, AgentThread, Place, eventually, namespace_of
from tests.store_support import LAYOUT, ROOT, chain, save

HEADER = b"kvtA" + wire.PROTOCOL_VERSION.to_bytes(4, "little")
"""What a frame begins with, but for its length."""

MANY_SHARDS = {**LAYOUT.describe(), "row_elements": 1, "shards": 1 << 20}

FORM = ("raw", LAYOUT.block_bytes)
"""The format and size of a slot, as a handshake names them."""


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
            lambda token: wire.Abort(token, 0, b"123", -1),
            lambda token: wire.Abort(token, 0, wire.pack_numbers([1], "Q"), 1),
            lambda token: wire.Abort(token, 0, wire.pack_numbers([1], "Q"), -2),
            lambda token: wire.MatchBlocks(token, 1, b"short", 0.0),
            lambda token: wire.Reserve(token, 1, [(b"short", 0, bytes(16))]),
            lambda token: wire.Reserve(token, 1, [(bytes(16), -1, bytes(16))]),
            lambda token: wire.Reserve(token, 1, [(bytes(16), 0, b"short")]),
            lambda token: wire.Reserve(
                token, 1, [(bytes(16), 0, bytes(16 * count)) for count in (wire.MAX_BLOCKS, 1)]
            ),
            lambda token: wire.Leave(token, 1, 1, b"", [0], b"123"),
        ],
        ids=range(12),
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
            HEADER + b"\xff\xff\xff\xff",
            wire.frame(wire.Refused("me")),
            wire.frame(wire.Attach(b"{}", bytes(16), LAYOUT.describe(), "g", 0, 1, *FORM, False)),
            wire.frame(wire.Attach(b"[1]", bytes(16), LAYOUT.describe(), "g", 0, 1, *FORM, False)),
            wire.frame(wire.Attach(b"{", bytes(16), LAYOUT.describe(), "g", 0, 1, *FORM, False)),
            wire.frame(wire.Attach(b"{}", bytes(16), {"layers": 2**62}, "g", 0, 1, "raw", 1, False)),
            wire.frame(wire.Attach(b"{}", namespace_of().id, LAYOUT.describe(), "g", 5, 1, *FORM, False)),
            HEADER + b"\x05\x00\x00\x00" + b"\xc1" * 5,
            wire.frame(wire.Attach(b"{}", bytes(16), MANY_SHARDS, "g", 0, 1, *FORM, False)),
            wire.frame(wire.Attach(b"{}", bytes(16), LAYOUT.describe(), "g", 0, 2**40, *FORM, False)),
        ],
        ids=range(12),
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

    def test_a_client_that_talks_slowly_is_not_listened_to_for_ever(self, place, agent, monkeypatch):
        monkeypatch.setattr(door, "HELLO_SECONDS", 0.1)
        ended = threading.Event()
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(place.directory / wire.DOOR))
            caller.sendall(HEADER + (1 << 20).to_bytes(4, "little"))

            def talk():
                with suppress(OSError):
                    while not ended.wait(0.01):
                        caller.send(b".")

            thread = threading.Thread(target=talk)
            thread.start()
            eventually(lambda: agent.agent.counters.snapshot().get("refused_clients") == 1)
            ended.set()
            thread.join(30)

    def test_a_client_is_told_also_of_what_nobody_thought_of(self, place, agent, monkeypatch, caplog):
        defect = ZeroDivisionError("a defect")
        monkeypatch.setattr(agent.stores, "join", lambda *arguments: (_ for _ in ()).throw(defect))
        client = place.connect(wait=0)
        eventually(lambda: "it refuses: a defect" in caplog.text)
        assert not client.connected
        monkeypatch.undo()
        assert client.wait_connected(60)
        client.close(1)

    def test_without_descriptors_the_agent_does_not_turn_in_circles(self, place, agent, monkeypatch):
        client = place.connect()
        tries, rounds = [0], [0]

        class Exhausted:
            def accept(self):
                tries[0] += 1
                raise OSError(errno.EMFILE, "too many open files")

        tend = agent.stores.tend
        listener = agent.agent._door._socket
        monkeypatch.setattr(agent.stores, "tend", lambda: (tend(), rounds.__setitem__(0, rounds[0] + 1)))
        monkeypatch.setattr(Exhausted, "fileno", lambda self: listener.fileno(), raising=False)
        monkeypatch.setattr(agent.agent._door, "_socket", Exhausted())
        late = place.connect(wait=0)
        eventually(lambda: rounds[0] > 3 and tries[0])
        assert save(client, chain(2)) == 2
        assert tries[0] <= rounds[0] + 1
        monkeypatch.setattr(agent.agent._door, "_socket", listener)
        assert late.wait_connected(60)
        late.close(1)
        client.close(1)

    def test_another_user_is_refused(self, place, agent, monkeypatch):
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        hello = wire.Attach(b"{}", bytes(16), LAYOUT.describe(), "g", 0, 1, *FORM, False)
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
        frame = bytearray(wire.frame(wire.Attach(b"future", b"", {}, "g", 0, 1, "raw", 1, False)))
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
