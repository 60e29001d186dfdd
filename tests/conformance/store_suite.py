"""What every store client must do, wherever the store runs. Inherit and provide `make_client`."""

from __future__ import annotations

import math

import pytest

from kvtier.layout import BlockLayout
from kvtier.store import Run, ticket_slot
from tests.agent_support import eventually
from tests.store_support import LAYOUT, ROOT, DictTier, chain, content, read, save

TWO_SHARDS = BlockLayout("bfloat16", tokens_per_block=4, layers=2, kv_factor=2, row_elements=64, shards=2)


class StoreSuite:
    """Tests of `kvtier.store.StoreClient`."""

    def make_client(self, tiers=(), slots=16, layout=LAYOUT, **options):
        """Return a store client over these tiers; closed by the fixture."""
        raise NotImplementedError

    @pytest.fixture
    def client(self):
        client = self.make_client()
        yield client
        client.close(5)

    def test_saved_blocks_are_matched_with_their_exact_bytes(self, client):
        hashes = chain(5)
        assert save(client, hashes) == 5
        match = client.match(hashes)
        assert read(client, match.slots) == [content(block) for block in hashes]
        assert dict(match.sources) == {"memory": 5}
        client.release(match.lease)

    def test_only_the_leading_run_counts(self, client):
        hashes = chain(6)
        save(client, hashes[:2])
        save(client, hashes[3:], hashes[2], 3)
        assert len(client.match(hashes).slots) == 2
        assert client.match(hashes[2:]).slots == ()

    def test_nothing_matches_nothing(self, client):
        match = client.match([])
        assert (match.lease, match.slots) == (0, ())
        match = client.match(chain(3))
        assert (match.lease, match.slots) == (0, ())

    def test_a_block_is_unreadable_until_committed(self, client):
        hashes = chain(2)
        tickets = client.reserve(ROOT, 0, hashes)
        assert client.match(hashes).slots == ()
        client.commit(tickets)
        assert len(client.match(hashes).slots) == 2

    def test_a_block_is_unreadable_until_every_shard_has_committed(self):
        client = self.make_client(layout=TWO_SHARDS)
        hashes = chain(1)
        tickets = client.reserve(ROOT, 0, hashes)
        client.commit(tickets, 1)
        client.commit(tickets, 1)
        assert client.match(hashes).slots == ()
        client.commit(tickets, 0)
        assert len(client.match(hashes).slots) == 1
        client.close(5)

    def test_what_is_held_or_being_filled_needs_no_slot(self, client):
        hashes = chain(3)
        first = client.reserve(ROOT, 0, hashes[:2])
        assert None not in first
        assert client.reserve(ROOT, 0, hashes)[:2] == [None, None]
        client.commit(first)
        assert client.reserve(ROOT, 0, hashes)[:2] == [None, None]

    def test_aborted_blocks_are_gone_and_can_be_saved_again(self, client):
        hashes = chain(2)
        client.abort(client.reserve(ROOT, 0, hashes))
        assert client.match(hashes).slots == ()
        assert save(client, hashes) == 2

    def test_a_stale_ticket_publishes_nothing(self, client):
        hashes = chain(1)
        (ticket,) = client.reserve(ROOT, 0, hashes)
        client.abort([ticket])
        client.commit([ticket])
        assert client.match(hashes).slots == ()

    def test_a_slot_is_free_when_no_shard_can_be_writing_to_it(self):
        client = self.make_client(slots=1, layout=TWO_SHARDS)
        tickets = client.reserve(ROOT, 0, chain(1))
        client.abort(tickets, 0)
        client.abort(tickets, 0)
        # The other one may be stopped in the middle of its copy.
        assert client.reserve(ROOT, 0, chain(1, seed=1)) == [None]
        client.commit(tickets, 1)
        assert client.match(chain(1)).slots == ()
        assert client.reserve(ROOT, 0, chain(1, seed=1)) != [None]
        client.close(5)

    def test_several_runs_are_reserved_at_once_and_the_answer_is_taken_later(self, client):
        chains = [chain(3), chain(2, seed=1)]
        runs = [Run(ROOT, 0, chains[0]), Run(ROOT, 0, chains[1]), Run(chains[0][0], 1, chains[0][1:2])]
        first, second, known = client.reserve_soon(runs)
        assert known.take(wait=True) == [None]
        for blocks, reservation in ((chains[1], second), (chains[0], first)):
            tickets = reservation.take()
            assert None not in tickets
            for block, ticket in zip(blocks, tickets, strict=True):
                client.slot_view(ticket_slot(ticket))[:] = content(block)
            client.commit(tickets)
        for blocks in chains:
            assert read(client, client.match(blocks).slots) == [content(block) for block in blocks]
        assert client.stats()["filling_slots"] == 0

    def test_what_is_given_up_is_free_and_what_was_taken_is_not(self, client):
        runs = [Run(ROOT, 0, chain(3)), Run(ROOT, 0, chain(2, seed=1)), Run(ROOT, 0, chain(1, seed=2))]
        taken, untaken, waited_for = client.reserve_soon(runs)
        (ticket,) = waited_for.take(wait=True)
        tickets = taken.take()
        for reservation in (taken, untaken, untaken):
            reservation.give_up()
        assert untaken.take(wait=True) == [None, None]
        eventually(lambda: client.stats()["filling_slots"] == 4, "two of six are given up")
        assert None not in client.reserve(ROOT, 0, chain(2, seed=1))
        for block, own in zip(chain(3), tickets, strict=True):
            client.slot_view(ticket_slot(own))[:] = content(block)
        client.commit([*tickets, ticket])
        assert read(client, client.match(chain(3)).slots) == [content(block) for block in chain(3)]

    def test_leased_blocks_are_not_evicted(self):
        client = self.make_client(slots=4)
        held = chain(2)
        save(client, held)
        match = client.match(held)
        for seed in range(1, 6):
            save(client, chain(4, seed))
        assert read(client, match.slots) == [content(block) for block in held]
        client.release(match.lease)
        for seed in range(6, 9):
            save(client, chain(4, seed))
        assert client.match(held).slots == ()
        client.close(5)

    def test_no_slot_means_skipping_not_waiting(self):
        client = self.make_client(slots=2)
        match_holds = chain(2)
        save(client, match_holds)
        match = client.match(match_holds)
        assert client.reserve(ROOT, 0, chain(2, seed=1)) == [None, None]
        assert client.stats()["save_skipped_blocks"] == 2
        client.release(match.lease)
        client.close(5)

    def test_a_lease_ends_when_every_shard_has_released_it(self):
        client = self.make_client(slots=1, layout=TWO_SHARDS)
        hashes = chain(1)
        save(client, hashes)
        match = client.match(hashes)
        client.release(match.lease, 0)
        client.release(match.lease, 0)
        assert client.reserve(ROOT, 0, chain(1, seed=1)) == [None]
        client.release(match.lease, 1)
        assert client.reserve(ROOT, 0, chain(1, seed=1)) != [None]
        client.close(5)

    def test_leases_expire_unless_they_are_held(self):
        now = [0.0]
        client = self.make_client(slots=1, clock=lambda: now[0])
        hashes = chain(1)
        save(client, hashes)
        kept, lost = client.match(hashes), client.match(hashes)
        now[0] = 59.0
        assert client.hold(kept.lease) == math.inf
        now[0] = 61.0
        assert client.hold(lost.lease) == 0.0
        now[0] = 10_000.0
        assert client.hold(kept.lease) == math.inf
        assert client.reserve(ROOT, 0, chain(1, seed=1)) == [None]
        assert read(client, kept.slots) == [content(hashes[0])]
        client.release(kept.lease)
        assert client.reserve(ROOT, 0, chain(1, seed=1)) != [None]
        assert client.stats()["leases"] == 0
        client.close(5)

    def test_unknown_leases_are_ignored(self, client):
        client.release(999)
        client.release(999, 0)
        assert client.hold(999) == 0.0

    def test_blocks_go_through_to_the_lower_tiers_and_come_back(self):
        disk, s3 = DictTier("disk"), DictTier("s3")
        client = self.make_client([disk, s3])
        hashes = chain(5)
        save(client, hashes)
        client.close(5)
        assert set(disk.blocks) == set(s3.blocks) == set(hashes)
        again = self.make_client([s3])
        match = again.match(hashes, wait=10)
        assert read(again, match.slots) == [content(block) for block in hashes]
        assert dict(match.sources) == {"s3": 5}
        again.close(5)

    def test_after_close_everything_is_a_miss(self):
        client = self.make_client()
        hashes = chain(2)
        save(client, hashes)
        client.close(5)
        client.close(5)
        assert client.match(hashes).slots == ()
        assert client.reserve(ROOT, 0, hashes) == [None, None]

    def test_slot_views_are_writable_and_one_shard_long(self, client):
        (ticket,) = client.reserve(ROOT, 0, chain(1))
        view = client.slot_view(ticket_slot(ticket))
        assert (len(view), view.readonly) == (client.layout.shard_bytes, False)
        client.abort([ticket])
