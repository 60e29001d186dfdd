"""The Triton kernels do what the compiled loops do: on a GPU, or without one in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.codec import PlaneSlots, slot_form
from kvtier.layout import BlockLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs Triton")

from kvtier.gpu.planes import GpuPlanes  # noqa: E402

SEED = int(os.environ.get("KVTIER_FUZZ_SEED", np.random.SeedSequence().entropy % 2**32))

# tokens, layers, parts, heads, dim: SmolLM2's, MLA, odd tokens, one token, dims that are no power of two.
GEOMETRIES = [(32, 3, 2, 3, 64), (5, 2, 1, 1, 576), (33, 1, 2, 2, 128), (1, 2, 2, 3, 7), (6, 2, 3, 1, 80)]
BLOCKS = 3
GUARD = 0x77


def form_of(tokens: int, layers: int, parts: int, heads: int, dim: int) -> PlaneSlots:
    layout = BlockLayout("bfloat16", tokens, layers, parts, heads * tokens * dim, head_dim=dim)
    form = slot_form(layout, "planes")
    assert isinstance(form, PlaneSlots)
    return form


def blocks_of(form: PlaneSlots, kind: str) -> np.ndarray:
    """Blocks, uint16 `[BLOCKS, elements]`: values, a few tiny or special ones among them, noise, zeros."""
    print(f"KVTIER_FUZZ_SEED={SEED}")
    rng, size = np.random.default_rng(SEED), (BLOCKS, form.shape.elements)
    values = (rng.standard_normal(size).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind == "tiny":
        values = np.where(rng.random(size) < 0.0005, rng.choice([0, 0x8000, 1, 0x807F], size), values)
    elif kind == "special":
        special = np.array([0, 0x8000, 1, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF], np.uint16)
        values = np.where(rng.random(size) < 0.0005, rng.choice(special, size), values)
    elif kind == "noise":
        values = rng.integers(0, 1 << 16, size, dtype=np.uint16)
    elif kind == "zero":
        values[:] = 0x8000
    return values.astype(np.uint16)


class Pool:
    """A pool with a guard after each block, blocks in any order, and kernels for it."""

    def __init__(self, form: PlaneSlots, pages: Sequence[int]) -> None:
        self.elements = form.shape.elements
        stride = (self.elements + 15) // 8 * 8 + 8
        self.memory = torch.full((5, stride), GUARD, dtype=torch.int16, device=DEVICE)
        self.pages = list(pages)
        self.slots = torch.full((BLOCKS, form.shard_bytes), 0x5A, dtype=torch.uint8, device=DEVICE)
        starts = np.array([self.memory[page].data_ptr() for page in pages]) - self.slots.data_ptr()
        self.places = torch.from_numpy(starts // 2).to(DEVICE)

    def fill(self, blocks: np.ndarray) -> None:
        self.memory[self.pages, : self.elements] = torch.from_numpy(blocks.view(np.int16)).to(DEVICE)

    def read(self) -> np.ndarray:
        outside = torch.ones_like(self.memory, dtype=torch.bool)
        outside[self.pages, : self.elements] = False
        assert bool((self.memory[outside] == GUARD).all())
        return self.memory[self.pages, : self.elements].cpu().numpy().view(np.uint16)


@pytest.mark.parametrize("kind", ["values", "tiny", "special", "noise", "zero"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_kernels_agree_with_the_compiled_loops(geometry: tuple[int, ...], kind: str) -> None:
    form = form_of(*geometry)
    fits = agree(form, blocks_of(form, kind))
    assert all(fits) or kind in ("special", "noise")


@given(
    geometry=st.tuples(*(st.integers(1, limit) for limit in (9, 3, 3, 3, 40))),
    near=st.integers(0, 255),
    spread=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_kernels_agree_for_any_geometry_and_bits(
    geometry: tuple[int, ...], near: int, spread: int, seed: int
) -> None:
    """Exponents `spread` wide, so that there are no escapes, a few, or too many; dims that are odd too."""
    form = form_of(*geometry)
    rng, size = np.random.default_rng(seed), (BLOCKS, form.shape.elements)
    exponents = (near + rng.integers(0, spread + 1, size)) & 0xFF
    noise = rng.integers(0, 1 << 16, size) & 0x807F
    agree(form, (noise | exponents << 7).astype(np.uint16))


def agree(form: PlaneSlots, blocks: np.ndarray) -> list[bool]:
    """Take blocks apart and put them together both ways, and each way out of the other; say which fit."""
    pool, kernels = Pool(form, [4, 0, 2]), GpuPlanes(form)
    pool.fill(blocks)
    kernels.split(pool.slots, pool.slots, pool.places)
    assert (pool.read() == blocks).all()
    slots = pool.slots.cpu().numpy()
    wanted = np.zeros_like(slots)
    for block, slot, other in zip(blocks, slots, wanted, strict=True):
        form.split_shard(block.view(np.uint8), other)
        ours, theirs = form.shard(slot), form.shard(other)
        assert ours.count == theirs.count
        assert (ours.bases == theirs.bases).all()
        assert (ours.nibbles == theirs.nibbles).all()
        assert (ours.rest == theirs.rest).all()
        if theirs.fits:
            listed = np.sort(ours.escapes[: ours.count])
            assert (listed == theirs.escapes[: theirs.count]).all()
            merged = np.empty(form.layout.shard_bytes, np.uint8)
            form.shape.merge(ours, merged)
            assert merged.tobytes() == block.tobytes()
    fits = [form.shard(slot).fits for slot in wanted]
    pool.slots.copy_(torch.from_numpy(wanted))
    pool.fill(np.full_like(blocks, 0xAAAA))
    kernels.merge(pool.slots, pool.slots, pool.places)
    for block, read, whole in zip(blocks, pool.read(), fits, strict=True):
        assert (read == block).all() or not whole
    return fits


def test_slots_of_nonsense_stay_inside_of_their_block() -> None:
    """Whatever stands in a slot, nothing outside of the block is written."""
    form = form_of(4, 2, 2, 1, 16)
    pool, kernels = Pool(form, [1, 3, 2]), GpuPlanes(form)
    rng = np.random.default_rng(SEED)
    pool.slots.copy_(torch.from_numpy(rng.integers(0, 256, pool.slots.shape, dtype=np.uint8)))
    for count in (1, 0x7FFFFFFF, 0xFFFFFFFF):
        pool.slots[:, :4] = torch.tensor(list(count.to_bytes(4, "little")), dtype=torch.uint8)
        kernels.merge(pool.slots, pool.slots, pool.places)
        pool.read()
