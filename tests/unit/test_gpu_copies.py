"""What is asked of the CUDA driver, with a driver that writes it down."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from kvtier.gpu.copies import CopyError, CudaCopies

DESTINATIONS, SOURCES, SIZES = [10, 20, 30], [1 << 40, 2, 3], [4, 5, 6]
COPIES = list(zip(DESTINATIONS, SOURCES, SIZES, strict=True))


class Driver:
    """Entry points as attributes; each answers the next of the given states, the last one for ever."""

    def __init__(self, one: list[int], batch: list[int] | None) -> None:
        self.log: list[object] = []

        def cuMemcpyAsync(destination, source, size, stream):
            self.log.append((destination, source, size, stream))
            return one.pop(0) if len(one) > 1 else one[0]

        def cuMemcpyBatchAsync(to, source, sizes, count, attributes, firsts, kinds, failed, stream):
            read = [(ctypes.c_uint64 * count).from_address(at)[:] for at in (to, source, sizes)]
            # Source in stream order, two places without meaning, overlap with compute preferred.
            assert (ctypes.c_uint32 * 6).from_address(attributes)[:] == [1, 0, 0, 0, 0, 1]
            assert (ctypes.c_uint64.from_address(firsts).value, kinds) == (0, 1)
            ctypes.c_uint64.from_address(failed).value = count
            self.log.append((list(zip(*read, strict=True)), stream))
            return batch.pop(0) if len(batch) > 1 else batch[0]

        self.cuMemcpyAsync = cuMemcpyAsync
        if batch is not None:
            self.cuMemcpyBatchAsync = cuMemcpyBatchAsync


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())


def copy(copies: CudaCopies, count: int = 3) -> None:
    lists = (DESTINATIONS, SOURCES, SIZES)
    copies(*(np.array(values[:count], dtype=np.uint64) for values in lists), 77)


def test_one_call_copies_everything():
    driver = Driver([1], [0])
    copy(CudaCopies(torch.device("cuda", 0), driver))
    assert driver.log == [(COPIES, 77)]


def test_nothing_is_no_call():
    driver = Driver([1], [1])
    copy(CudaCopies(torch.device("cuda", 0), driver), 0)
    assert driver.log == []


def test_an_old_driver_is_called_for_each_copy():
    driver = Driver([0], None)
    copy(CudaCopies(torch.device("cuda", 0), driver))
    assert driver.log == [(*one, 77) for one in COPIES]


def test_a_batch_that_is_refused_is_copied_one_by_one_and_no_other_is_tried():
    driver = Driver([0], [801])
    copies = CudaCopies(torch.device("cuda", 0), driver)
    copy(copies)
    copy(copies)
    assert driver.log == [(COPIES, 77), *[(*one, 77) for one in COPIES * 2]]


def test_a_copy_that_is_refused_is_an_error():
    driver = Driver([0, 700], None)
    with pytest.raises(CopyError, match="700"):
        copy(CudaCopies(torch.device("cuda", 0), driver))
