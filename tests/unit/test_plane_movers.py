"""Blocks on their way between plane slots and a pool: every byte of every page, and no other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from kvtier.codec import PlaneSlots, slot_form
from kvtier.gpu.plane_movers import HostPlanes
from kvtier.gpu.ranges import NO_PAGE, PageMap, Region
from kvtier.layout import BlockLayout

LAYOUT = BlockLayout("bfloat16", 4, 2, 2, 512, head_dim=64)
SIZE = LAYOUT.block_bytes
PAGES = 6


def form() -> PlaneSlots:
    form = slot_form(LAYOUT, "planes")
    assert isinstance(form, PlaneSlots)
    return form


class Host:
    """Slots in memory, and a pool of pages that are one range, or two in places of their own."""

    def __init__(self, plain: bool) -> None:
        rng = np.random.default_rng(7)
        values = rng.uniform(-2, 2, (PAGES, SIZE // 2)).astype(np.float32).view(np.uint32) >> 16
        values[:, 5] = 0
        self.blocks = values.astype(np.uint16).view(np.uint8)
        self.slots = np.zeros((PAGES, form().shard_bytes), np.uint8)
        cuts = [0, SIZE] if plain else [0, 1000, SIZE]
        self.parts = [np.ascontiguousarray(self.blocks[:, a:b]) for a, b in itertools.pairwise(cuts)]
        regions = [
            Region(group, part.ctypes.data, part.shape[1], part.shape[1], PAGES)
            for group, part in enumerate(self.parts)
        ]
        self.map = PageMap(regions, len(regions), sparse=not plain)
        self.mover = HostPlanes(form(), self.map)

    def addresses(self, *slots: int) -> np.ndarray:
        return np.array([self.slots[slot].ctypes.data for slot in slots], np.uint64)

    def pages(self, *pages: int) -> list[tuple[int, ...]]:
        return [(page,) * len(self.parts) for page in pages]

    def read(self) -> np.ndarray:
        return np.concatenate(self.parts, axis=1)


@pytest.mark.parametrize("plain", [True, False])
def test_what_was_saved_is_loaded_into_other_pages(plain: bool) -> None:
    host = Host(plain)
    assert host.map.is_plain(2) == plain
    host.mover.save((host.addresses(3, 1), host.pages(0, 2)), 0)
    assert form().shard(host.slots[3]).count == 1
    assert not host.slots[[0, 2, 4, 5]].any()
    host.mover.load((host.addresses(1, 3), host.pages(5, 4)), 0)
    wanted = host.blocks.copy()
    wanted[[5, 4]] = host.blocks[[2, 0]]
    assert (host.read() == wanted).all()


def test_pages_that_a_block_lacks_are_left_alone() -> None:
    host = Host(plain=False)
    host.mover.save((host.addresses(0), host.pages(0)), 0)
    host.mover.load((host.addresses(0), [(NO_PAGE, 3)]), 0)
    wanted = host.blocks.copy()
    wanted[3, 1000:] = host.blocks[0, 1000:]
    assert (host.read() == wanted).all()


@pytest.mark.parametrize("page", [-1, PAGES])
def test_pages_that_the_pool_has_not_are_refused(page: int) -> None:
    host = Host(plain=True)
    for move in (host.mover.load, host.mover.save):
        with pytest.raises(IndexError, match="page"):
            move((host.addresses(0), host.pages(page)), 0)
    assert (host.read() == host.blocks).all()


def test_starts_of_plain_blocks() -> None:
    host = Host(plain=True)
    assert (host.map.starts([(2,), (0,)]) == host.parts[0].ctypes.data + np.array([2 * SIZE, 0])).all()
    with pytest.raises(IndexError, match="page 6"):
        host.map.starts([(PAGES,)])
    odd = PageMap([Region(0, 4096 + 8, 4096, 4096, 2)], 1)
    assert odd.is_plain(8)
    assert not odd.is_plain(16)
