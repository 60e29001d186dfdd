"""Lookups that wait for a lower tier: they hold nobody up, and leave nothing behind when nobody waits."""

from __future__ import annotations

import socket
import threading

from kvtier.agent.client import Deadlines
from kvtier.codec import BlockCodec
from tests.agent_support import AgentThread, eventually, namespace_of, store_of
from tests.store_support import LAYOUT, DictTier, chain, content, read, save


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

    def test_engines_that_wait_for_the_disk_at_their_end_leave_lookups_their_turn(self, place, monkeypatch):
        monkeypatch.setattr("kvtier.agent.server.WAITERS", 1)
        with AgentThread(place) as agent:
            first, second, looking = (place.connect() for _ in range(3))
            gate, asked = threading.Event(), []

            def flush(timeout):
                asked.append(timeout)
                return gate.wait(timeout)

            store_of(agent).flush = flush
            ending = threading.Thread(target=first.close, args=(60.0,))
            ending.start()
            eventually(lambda: asked)
            second.close(60.0)
            assert asked == [60.0]
            assert ending.is_alive()
            assert save(looking, chain(1)) == 1
            gate.set()
            ending.join(30)
            looking.close(0)

    def test_what_was_committed_is_written_before_the_agent_ends(self, place):
        tier = DictTier("disk")
        agent = AgentThread(place, [tier])
        client = place.connect()
        save(client, chain(8))
        client.stats()
        agent.end()
        assert set(tier.blocks) == set(chain(8))
        client.close(1)
