"""The agent's client: epochs, arenas that are mapped and let go of, and where agents are found."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvtier.agent.mapping import Mappings
from kvtier.agent.place import agent_directory, check_directory, make_directory, take_lock
from kvtier.config import parse_config
from kvtier.errors import ConfigError
from kvtier.store import ticket_slot
from kvtier.tiers.arena import MappedMemory
from tests.agent_support import AgentThread, eventually, namespace_of
from tests.store_support import ROOT, chain, content, read, save


class TestEpochs:
    """An agent that is started anew knows nothing of what the one before handed out."""

    @pytest.fixture
    def restarted(self, place):
        """A client whose agent was replaced, and what it still holds of the first: lease, tickets."""
        first = AgentThread(place)
        client = place.connect()
        save(client, chain(4))
        match = client.match(chain(4))
        tickets = client.reserve(ROOT, 0, chain(3, seed=1))
        old_epoch = client._link.epoch
        first.end()
        second = AgentThread(place)
        eventually(lambda: client.connected and client._link.epoch != old_epoch)
        yield client, match, tickets
        client.close(1)
        second.end()

    def test_promised_blocks_are_read_from_the_old_arena(self, restarted):
        client, match, _ = restarted
        save(client, chain(16, seed=5))
        assert read(client, match.slots) == [content(block) for block in chain(4)]
        assert client.stats()["client_arenas"] == 2

    def test_old_leases_and_tickets_mean_nothing_to_the_new_agent(self, restarted):
        client, old, tickets = restarted
        save(client, chain(2))
        new = client.match(chain(2))
        fresh = client.reserve(ROOT, 0, chain(3, seed=1))
        # The new agent counts from 1 as well: without epochs these would be the same numbers.
        assert old.lease & 0xFFFFFFFF == new.lease & 0xFFFFFFFF
        # The slots of the old lease do not change for a while, and its term runs.
        assert client.hold(old.lease)
        client.release(old.lease)
        assert not client.hold(old.lease)
        client.commit(tickets)
        client.abort(tickets)
        assert client.stats()["leases"] == 1
        assert client.stats()["filling_slots"] == 3
        assert client.match(chain(3, seed=1)).slots == ()
        client.commit(fresh)
        assert len(client.match(chain(3, seed=1)).slots) == 3

    def test_an_old_arena_is_let_go_of_after_a_leases_term(self, place):
        now = [0.0]
        undone = []
        prepared = []

        def prepare(memory):
            prepared.append(len(memory))
            return lambda: undone.append(len(prepared))

        first = AgentThread(place)
        client = place.connect(clock=lambda: now[0], prepare=prepare)
        save(client, chain(1))
        match = client.match(chain(1))
        view = client.slot_view(match.slots[0])
        first.end()
        with AgentThread(place):
            # It may not have noticed yet that the first agent has ended.
            eventually(lambda: client.connected and len(prepared) == 2)
            assert prepared == [16 * 4096] * 2
            now[0] = 59.0
            client._link._ring()
            client.stats()
            assert undone == []
            now[0] = 60.0
            client._link._ring()
            eventually(lambda: undone)
            assert client.stats()["client_arenas"] == 1
            # Whoever kept a view keeps the memory.
            assert bytes(view) == content(chain(1)[0])
            with pytest.raises(ValueError, match="not mapped"):
                client.slot_view(match.slots[0])
            client.close(1)
        assert undone == [2, 2]

    def test_an_arena_that_cannot_be_prepared_is_no_reason_to_stop_trying(self, place, caplog, monkeypatch):
        monkeypatch.setattr("kvtier.agent.link.LAST_RETRY_SECONDS", 0.05)
        calls = []

        def prepare(memory):
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("no CUDA yet")

        with AgentThread(place):
            client = place.connect(prepare=prepare)
            assert len(calls) == 2
            assert "no CUDA yet" in caplog.text
            client.close(1)


class TestMappings:
    def mappings(self, now, log):
        def prepare(memory):
            log.append("prepared")
            return lambda: log.append("undone")

        return Mappings(prepare, 60.0, lambda: now[0])

    def test_epochs_of_one_arena_map_it_once(self):
        now, log = [0.0], []
        mappings = self.mappings(now, log)
        memory = MappedMemory.anonymous(4 * 4096)
        for epoch in (5, 6):
            mappings.enter(epoch, 1, os.dup(memory.fd), memory.length)
        assert log == ["prepared"]
        mappings.view(5 << 32 | 2, 0, 100)[:] = b"a" * 100
        assert bytes(mappings.view(6 << 32 | 2, 50, 50)) == b"a" * 50
        assert bytes(memory.part(2 * 4096, 100)) == b"a" * 100
        now[0] = 60.0
        mappings.drop_old()
        assert log == ["prepared"]
        with pytest.raises(ValueError, match="not mapped"):
            mappings.view(5 << 32, 0, 1)
        mappings.view(6 << 32, 0, 1)
        mappings.close()
        assert log == ["prepared", "undone"]
        memory.close()

    def test_slots_outside_of_the_arena_are_refused(self):
        mappings = Mappings(None, 60.0, lambda: 0.0)
        memory = MappedMemory.anonymous(4 * 4096)
        mappings.enter(5, 1, os.dup(memory.fd), memory.length)
        for place, start in [(4, 0), (3, 4095), (0xFFFFFFFF, 0), (0, -1)]:
            with pytest.raises(IndexError):
                mappings.view(5 << 32 | place, start, 2)
        mappings.close()
        memory.close()

    def test_a_descriptor_that_is_shorter_than_said_is_refused_and_closed(self):
        mappings = Mappings(None, 60.0, lambda: 0.0)
        memory = MappedMemory.anonymous(4096)
        copy = os.dup(memory.fd)
        with pytest.raises(ValueError, match="length"):
            mappings.enter(5, 1, copy, 8 * 4096)
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(copy)
        memory.close()


def test_tickets_and_slots_carry_the_epoch():
    generation, slot, epoch = 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFF
    assert ticket_slot(generation << 32 | slot) == slot
    assert ticket_slot(epoch << 63 | generation << 32 | slot) == epoch << 32 | slot


def test_the_client_is_a_miss_without_an_agent(place):
    client = place.connect(wait=0)
    assert not client.connected
    assert client.match(chain(2), wait=1000).slots == ()
    assert client.reserve(ROOT, 0, chain(2)) == [None, None]
    assert not client.hold(1)
    client.release(1)
    client.commit([1, 2])
    client.abort([1, 2])
    stats = client.stats()
    assert stats["client_connected"] == 0
    assert stats["client_missed_lookups"] == 1
    with AgentThread(place):
        assert client.wait_connected(60)
        assert save(client, chain(2)) == 2
        client.close(1)


def test_odd_arguments_are_misses_not_errors(place):
    with AgentThread(place):
        client = place.connect()
        assert client.match([b"short"]).slots == ()
        client.release(-5, -5)
        client.release(1 << 200)
        client.commit([-1, 1 << 200])
        assert save(client, chain(2)) == 2
        for wait in (-1.0, float("nan")):
            assert len(client.match(chain(2), wait=wait).slots) == 2
        client.close(1)


def test_names_of_namespaces_are_any_text(place):
    with AgentThread(place):
        namespace = namespace_of(model="Übermodell 模型", nested={"a": [1, 2.5, None]})
        client = place.connect(namespace)
        assert save(client, chain(1)) == 1
        client.close(1)


class TestPlace:
    def config(self, **settings):
        return parse_config({"memory": {"size": "1MiB"}, **settings})

    def test_a_configuration_has_its_directory(self, monkeypatch, place):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place.directory))
        directory = agent_directory(self.config())
        assert directory.parent == place.directory / "kvtier"
        assert agent_directory(self.config(agent={"mode": "external", "http": "127.0.0.1:1"})) == directory
        assert agent_directory(self.config(lookup_wait="51ms")) != directory
        assert agent_directory(self.config(agent={"directory": "/run/x"})) == Path("/run/x")

    def test_without_a_runtime_directory_it_is_below_run_or_tmp(self, monkeypatch):
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert agent_directory(self.config()).parent == Path(f"/tmp/kvtier-{os.geteuid()}")
        monkeypatch.setattr(os, "access", lambda path, mode: True)
        assert agent_directory(self.config()).parent == Path("/run/kvtier")
        # A name that leaves no room for the sockets' names is of no use.
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "x" * 100)
        assert agent_directory(self.config()).parent == Path("/run/kvtier")

    def test_the_directory_is_for_this_user_alone(self, tmp_path):
        directory = tmp_path / "a" / "b"
        make_directory(directory)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        directory.chmod(0o777)
        with pytest.raises(ConfigError, match="others may write"):
            check_directory(directory)
        make_directory(directory)
        check_directory(directory)

    def test_what_somebody_else_may_have_put_there_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "target").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "target")
        (tmp_path / "file").write_text("")
        for name in ("link", "file"):
            with pytest.raises(ConfigError):
                make_directory(tmp_path / name)
            with pytest.raises(ConfigError, match="no directory"):
                check_directory(tmp_path / name)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(ConfigError, match="another user"):
            check_directory(tmp_path / "target")

    def test_the_lock_is_held_by_one(self, tmp_path):
        lock = take_lock(tmp_path)
        assert lock is not None
        assert take_lock(tmp_path) is None
        copy = os.dup(lock)
        os.close(lock)
        assert take_lock(tmp_path) is None
        os.close(copy)
        again = take_lock(tmp_path)
        assert again is not None
        os.close(again)
