"""Plane slots on a GPU: blocks come out of the pool and back as they were, through streams and in batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvtier.codec import PlaneSlots, slot_form
from kvtier.gpu import pin
from kvtier.gpu import plane_movers as movers
from kvtier.gpu.copies import CudaCopies
from kvtier.gpu.ranges import NO_PAGE, PageMap, Region
from kvtier.layout import BlockLayout
from kvtier.tiers.memory import MemoryTier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYOUT = BlockLayout("bfloat16", 32, 4, 2, 4 * 32 * 128, head_dim=128)
PAGES = 24
HALF = LAYOUT.block_bytes // 2


class Rig:
    """Pinned slots, a pool of whole pages or of halves, and the mover between them, in batches of four."""

    def __init__(self, plain: bool) -> None:
        form = slot_form(LAYOUT, "planes")
        assert isinstance(form, PlaneSlots)
        self.form = form
        self.memory = MemoryTier(PAGES * (form.slot_bytes + 4096), form.slot_bytes)
        self.pinned = pin(self.memory.buffer(), torch.device("cuda"))
        assert self.pinned is not None
        generator = torch.Generator("cuda").manual_seed(3)
        values = torch.randn(PAGES, LAYOUT.block_bytes // 2, device="cuda", generator=generator)
        values[:, ::5000] = 0
        self.blocks = values.bfloat16().view(torch.uint8).view(PAGES, -1)
        cuts = [(0, LAYOUT.block_bytes)] if plain else [(0, HALF), (HALF, LAYOUT.block_bytes)]
        self.parts = [self.blocks[:, start:stop].contiguous() for start, stop in cuts]
        regions = [
            Region(group, part.data_ptr(), part.shape[1], part.shape[1], PAGES)
            for group, part in enumerate(self.parts)
        ]
        self.map = PageMap(regions, len(regions), sparse=not plain)
        device = torch.device("cuda", 0)
        self.mover = movers.CudaPlanes(form, self.map, CudaCopies(device), device)
        self.stream = torch.cuda.Stream()

    def slots(self, numbers: list[int]) -> np.ndarray:
        return np.array(
            [np.frombuffer(self.memory.view(n), np.uint8).ctypes.data for n in numbers], np.uint64
        )

    def pages(self, numbers: list[int]) -> list[tuple[int, ...]]:
        return [(page,) * len(self.parts) for page in numbers]

    def read(self) -> torch.Tensor:
        return torch.cat(self.parts, dim=1)

    def close(self) -> None:
        torch.cuda.synchronize()
        assert self.pinned is not None
        self.pinned.unpin()
        self.memory.close()


@pytest.fixture(params=[True, False], ids=["plain", "halves"])
def rig(request, monkeypatch):
    monkeypatch.setattr(movers, "STAGING_BYTES", 1 << 20)
    rig = Rig(request.param)
    assert movers.batch_blocks(rig.form) == 4
    yield rig
    rig.close()


def test_saved_and_loaded_into_other_pages(rig: Rig) -> None:
    saved, loaded = list(range(0, 12)), list(range(23, 11, -1))
    rig.mover.save((rig.slots(saved), rig.pages(saved)), rig.stream.cuda_stream)
    rig.stream.synchronize()
    for number in saved:
        planes = rig.form.planes(rig.memory.view(number))[0]
        assert planes.fits
        assert planes.count > 0
        raw = np.empty(LAYOUT.block_bytes, np.uint8)
        rig.form.merge(rig.memory.view(number), raw)
        assert raw.tobytes() == rig.blocks[number].cpu().numpy().tobytes()
    rig.mover.load((rig.slots(saved), rig.pages(loaded)), rig.stream.cuda_stream)
    rig.stream.synchronize()
    wanted = rig.blocks.clone()
    wanted[loaded] = rig.blocks[saved]
    assert torch.equal(rig.read(), wanted)


def test_loads_stand_in_the_order_of_their_stream(rig: Rig) -> None:
    """A load of other blocks into the same pages, right behind the first, must not overtake it."""
    first, second = list(range(0, 7)), list(range(7, 14))
    rig.mover.save((rig.slots(first + second), rig.pages(first + second)), rig.stream.cuda_stream)
    for part in rig.parts:
        part.record_stream(rig.stream)
    with torch.cuda.stream(rig.stream):
        torch.cuda._sleep(20_000_000)
    for numbers in (first, second, first):
        rig.mover.load((rig.slots(numbers), rig.pages(list(range(14, 21)))), rig.stream.cuda_stream)
    assert not rig.stream.query()
    rig.stream.synchronize()
    wanted = rig.blocks.clone()
    wanted[14:21] = rig.blocks[:7]
    assert torch.equal(rig.read(), wanted)


def test_pages_that_a_block_lacks_are_left_alone(rig: Rig) -> None:
    if len(rig.parts) == 1:
        pytest.skip("blocks of one range have all their pages")
    rig.mover.save((rig.slots([0]), rig.pages([0])), rig.stream.cuda_stream)
    rig.mover.load((rig.slots([0]), [(NO_PAGE, 9)]), rig.stream.cuda_stream)
    rig.stream.synchronize()
    wanted = rig.blocks.clone()
    wanted[9, HALF:] = rig.blocks[0, HALF:]
    assert torch.equal(rig.read(), wanted)


def test_pages_that_the_pool_has_not_are_refused(rig: Rig) -> None:
    for move in (rig.mover.load, rig.mover.save):
        with pytest.raises(IndexError, match="page"):
            move((rig.slots([0]), rig.pages([PAGES])), rig.stream.cuda_stream)
        assert torch.cuda.current_stream() != rig.stream
    rig.stream.synchronize()
    assert torch.equal(rig.read(), rig.blocks)


def taken() -> list[int]:
    """Return how often memory was taken, of the GPU or pinned, and how many kernels were compiled."""
    from kvtier.gpu import plane_kernels as kernels

    compiled = [kernels.merge, kernels.merge_escapes, kernels.split]
    return [
        torch.cuda.memory_stats()["allocation.all.allocated"],
        torch.cuda.host_memory_stats()["num_host_alloc"],
        sum(len(caches[0]) for kernel in compiled for caches in kernel.device_caches.values()),
    ]


def test_moving_takes_no_memory_and_compiles_nothing(rig: Rig) -> None:
    """Either may wait for the GPU, and that on the engine's thread; also when many moves are under way."""
    before = taken()
    assert before[2] > 0
    for _ in range(10):
        for count in (1, 2, 3, 4, 5, 9, 11):
            blocks = rig.slots(list(range(count))), rig.pages(list(range(count)))
            for move in (rig.mover.save, rig.mover.load):
                move(blocks, rig.stream.cuda_stream)
        rig.stream.synchronize()
    assert taken() == before
