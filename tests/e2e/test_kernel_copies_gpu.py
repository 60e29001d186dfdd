"""Copies by a kernel on a GPU: whatever it cannot reach goes to the driver, and every byte arrives."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from kvtier.gpu import kernel_copies, pin
from kvtier.gpu.copies import CudaCopies

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE, COUNT = 48 << 10, 100
DEVICE = torch.device("cuda", 0)


def copies():
    """Return copies by the kernel, and what the driver was asked to do instead."""
    left, driver = [], CudaCopies(DEVICE)

    def others(destinations, sources, sizes, stream):
        left.append(len(sizes))
        driver(destinations, sources, sizes, stream)

    return kernel_copies.KernelCopies(DEVICE, others, SIZE), left


def host(pinned: bool):
    """Return memory of `COUNT` ranges and what keeps it pinned."""
    memory = mmap.mmap(-1, COUNT * SIZE)
    values = np.frombuffer(memory, np.uint8)
    values[:] = np.random.default_rng(1).integers(0, 256, values.size, dtype=np.uint8)
    return values.reshape(COUNT, SIZE), pin(memoryview(memory), DEVICE) if pinned else None


def addresses(base: int, order: np.ndarray) -> np.ndarray:
    return np.uint64(base) + order.astype(np.uint64) * np.uint64(SIZE)


@pytest.mark.parametrize("pinned", [True, False])
def test_ranges_arrive_from_host_memory(pinned):
    copy, left = copies()
    source, registration = host(pinned)
    pool = torch.zeros(COUNT, SIZE, dtype=torch.uint8, device=DEVICE)
    order = np.random.default_rng(2).permutation(COUNT)
    stream = torch.cuda.Stream()
    sizes = np.full(COUNT, SIZE, np.uint64)
    there = addresses(pool.data_ptr(), np.arange(COUNT))
    copy(there, addresses(source.ctypes.data, order), sizes, stream.cuda_stream)
    stream.synchronize()
    assert np.array_equal(pool.cpu().numpy(), source[order])
    assert left == ([] if pinned else [COUNT])
    if registration is not None:
        registration.unpin()


def test_ranges_within_the_gpu_and_ranges_of_other_sizes():
    copy, left = copies()
    generator = torch.Generator("cuda").manual_seed(1)
    source = torch.randint(0, 256, (COUNT, SIZE), dtype=torch.uint8, device=DEVICE, generator=generator)
    pool = torch.zeros_like(source)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    order = np.random.default_rng(2).permutation(COUNT)
    ways = addresses(pool.data_ptr(), np.arange(COUNT)), addresses(source.data_ptr(), order)
    copy(*ways, np.full(COUNT, SIZE, np.uint64), stream.cuda_stream)
    stream.synchronize()
    assert torch.equal(pool, source[torch.from_numpy(order).to(DEVICE)])
    assert left == []
    pool.zero_()
    torch.cuda.synchronize()
    copy(*ways, np.full(COUNT, SIZE // 2, np.uint64), stream.cuda_stream)
    stream.synchronize()
    assert left == [COUNT]
    assert torch.equal(pool[:, : SIZE // 2], source[torch.from_numpy(order).to(DEVICE), : SIZE // 2])
    assert not pool[:, SIZE // 2 :].any()


def test_copying_takes_no_memory_and_compiles_nothing(monkeypatch):
    """Either may wait for the GPU, and that on the engine's thread."""
    monkeypatch.setattr(kernel_copies, "RANGES", 32)
    copy, left = copies()
    source, registration = host(pinned=True)
    pool = torch.zeros(COUNT, SIZE, dtype=torch.uint8, device=DEVICE)
    stream = torch.cuda.Stream()

    def taken() -> list[int]:
        from kvtier.gpu.copy_kernel import copy_ranges

        return [
            torch.cuda.memory_stats()["allocation.all.allocated"],
            torch.cuda.host_memory_stats()["num_host_alloc"],
            sum(len(cache[0]) for cache in copy_ranges.device_caches.values()),
        ]

    before = taken()
    for count in (1, 2, 31, 32, 33, COUNT):
        ways = (addresses(pool.data_ptr(), np.arange(count)), addresses(source.ctypes.data, np.arange(count)))
        copy(*ways, np.full(count, SIZE, np.uint64), stream.cuda_stream)
    stream.synchronize()
    assert taken() == before
    assert np.array_equal(pool.cpu().numpy(), source)
    assert left == []
    registration.unpin()
