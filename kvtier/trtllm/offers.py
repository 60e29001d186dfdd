"""Blocks on their way to the store: whole, asked a slot for, ordered to be saved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvtier.connector.passes import Pages
from kvtier.store.base import Reservation, Run, StoreClient
from kvtier.trtllm.meta import Save
from kvtier.trtllm.pool import PageGroup
from kvtier.trtllm.request import RequestState

PATIENCE_SECONDS = 5.0
"""What was asked for a request that is not scheduled for so long is given back, and asked for again later."""


@dataclass(eq=False, slots=True)
class _Offer:
    """A run of one request's blocks that slots were asked for.

    Attributes:
        request_id: The request.
        state: Its state.
        placement: The state's number of the pages that are meant.
        first: The run's first block.
        pages: Pages of each block of it.
        turn: The pass in which the slots were asked for.
        since: When that was.
        reservation: The slots.
    """

    request_id: int
    state: RequestState
    placement: int
    first: int
    pages: list[Pages]
    turn: int
    since: float
    reservation: Reservation


class Offers:
    """What was offered to the store and has no slot yet.

    Slots are asked for all requests of a pass at once, and nobody waits for the answer: where it is not here,
    a block is saved in a later pass of its request. A request that is scheduled still holds the pages of its
    whole blocks, and nobody writes to them. Only where attention has windows is the answer waited for.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open: list[_Offer] = []

    def __len__(self) -> int:
        return len(self._open)

    def orders(
        self,
        grown: Iterable[tuple[int, RequestState, int]],
        store: StoreClient,
        groups: Sequence[PageGroup],
        turn: int,
    ) -> list[tuple[int, list[Save]]]:
        """Offer what a pass completes, and order what there are slots for by now.

        Args:
            grown: Requests of the pass with blocks that were not offered: id, state and whole blocks.
            store: The store.
            groups: The spaces of page ids.
            turn: The pass; the states of its requests have it.

        Returns:
            Ids of requests of the pass, and what is to be saved of them behind it.
        """
        self._offer(grown, store, groups, turn)
        offers, self._open = self._open, []
        # Where attention has windows, pages that the next pass does not look at any more are lost to it.
        windows = any(group.window is not None for group in groups)
        now = self._clock()
        ordered: list[tuple[int, list[Save]]] = []
        # Most of what is open waits for an answer: this asks for it in each pass.
        for number, offer in enumerate(offers):
            try:
                same = offer.state.placement == offer.placement
                tickets = None
                if same and offer.state.turn == turn:
                    tickets = offer.reservation.take(wait=windows)
                if tickets is not None:
                    saves = _redeem(offer, tickets, store, groups, late=windows and offer.turn != turn)
                    if saves:
                        ordered.append((offer.request_id, saves))
                elif same and now - offer.since <= PATIENCE_SECONDS:
                    self._open.append(offer)
                else:
                    _give_back(offer)
            except Exception:
                self._open += offers[number + 1 :]
                store.abort([save.ticket for _, saves in ordered for save in saves])
                raise
        return ordered

    def last(
        self,
        request_id: int,
        state: RequestState,
        blocks: int,
        store: StoreClient,
        groups: Sequence[PageGroup],
    ) -> list[Save]:
        """Order what is left to save of the leading `blocks` blocks of a request that has ended.

        Its last slots are waited for, as long as the store may take to answer one call.
        """
        turn = state.turn + 1
        self._offer([(request_id, state, blocks)], store, groups, turn)
        own = [offer for offer in self._open if offer.state is state]
        self._open = [offer for offer in self._open if offer.state is not state]
        saves: list[Save] = []
        for offer in own:
            if offer.placement != state.placement:
                _give_back(offer)
                continue
            # The engine tells a request's pages once more at its end.
            tickets = offer.reservation.take(wait=True) or ()
            for block, ticket in enumerate(tickets, offer.first):
                pages = state.pages_of(block, groups)
                if ticket is None:
                    continue
                if pages is not None and state.can_save(block, pages, groups):
                    saves.append(Save(ticket, pages))
                else:
                    store.abort([ticket])
        return saves

    def drop(self, state: RequestState) -> None:
        """Give back what was asked for a request that nothing more is saved of."""
        for offer in self._open:
            if offer.state is state:
                _give_back(offer)
        self._open = [offer for offer in self._open if offer.state is not state]

    def _offer(
        self,
        grown: Iterable[tuple[int, RequestState, int]],
        store: StoreClient,
        groups: Sequence[PageGroup],
        turn: int,
    ) -> None:
        """Ask slots for those of the leading blocks of requests that were not offered yet.

        Blocks that were matched or loaded are offered too, once: what fell out of the arena comes back.
        """
        runs: list[Run] = []
        places: list[tuple[int, RequestState, int, int, list[Pages]]] = []
        for request_id, state, blocks in grown:
            hashes = state.hash_through(blocks)
            for first, pages in _runs(state, blocks, groups):
                runs.append(Run(state.hash_before(first), first, hashes[first : first + len(pages)]))
                places.append((request_id, state, state.placement, first, pages))
        if not runs:
            return
        now = self._clock()
        reservations = zip(places, store.reserve_soon(runs), strict=True)
        self._open += [_Offer(*place, turn, now, reservation) for place, reservation in reservations]


def _runs(state: RequestState, blocks: int, groups: Sequence[PageGroup]) -> Iterable[tuple[int, list[Pages]]]:
    """Yield the runs of blocks that can be saved among those not handled: first block and pages."""
    run: list[Pages] = []
    while state.handled < blocks:
        block = state.handled
        pages = state.pages_of(block, groups)
        if pages is None:
            break
        state.handled = block + 1
        if state.can_save(block, pages, groups):
            run.append(pages)
        elif run:
            yield block - len(run), run
            run = []
    if run:
        yield state.handled - len(run), run


def _redeem(
    offer: _Offer,
    tickets: Sequence[int | None],
    store: StoreClient,
    groups: Sequence[PageGroup],
    *,
    late: bool,
) -> list[Save]:
    """Order what there are slots for; `late`: a window may have passed some of it since it was offered."""
    saves = []
    for block, (ticket, pages) in enumerate(zip(tickets, offer.pages, strict=True), offer.first):
        if ticket is None:
            continue
        if late and not offer.state.can_save(block, pages, groups):
            store.abort([ticket])
        else:
            saves.append(Save(ticket, pages))
    return saves


def _give_back(offer: _Offer) -> None:
    """Give an offer up: its blocks are offered again with the request's next pages."""
    offer.state.handled = min(offer.state.handled, offer.first)
    offer.reservation.give_up()
