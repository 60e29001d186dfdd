"""Numbers for kernels: rooms are used again only when nothing under way reads them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from kvtier.gpu.tables import Tables
from tests.virtual_gpu import VirtualGpu

DEVICE = torch.device("cpu")


class Event:
    """As CUDA's: passed as long as it was never recorded."""

    def __init__(self) -> None:
        self._inner = None

    def record(self, stream) -> None:
        self._inner = stream.record_event()

    def query(self) -> bool:
        return self._inner is None or self._inner.passed


@pytest.mark.parametrize("seed", range(4))
def test_no_table_is_written_over_while_something_reads_it(seed):
    print(f"seed {seed}")
    rng = random.Random(seed)
    gpu = VirtualGpu(rng)
    streams = [gpu.stream() for _ in range(2)]
    tables = Tables(DEVICE, 40, 3, Event)
    memory = {tensor.data_ptr() for tensor in tables._gpu}
    read, own = [], 0
    for number in range(300):
        values = np.full(rng.randrange(1, 41), number, np.int64)
        stream = rng.choice(streams)
        with tables.lend(values, stream) as table:
            own += table.data_ptr() not in memory

            def kernel(table=table, number=number) -> None:
                read.append(bool((table == number).all()))

            gpu.run(stream, kernel)
        values[:] = -1
    gpu.synchronize()
    assert len(read) == 300
    assert all(read)
    # Both happen: rooms that are free, and none.
    assert 0 < own < 300


def test_a_room_whose_use_failed_is_used_again_only_when_the_stream_has_come_by():
    gpu = VirtualGpu(random.Random(1))
    stream = gpu.stream()
    tables = Tables(DEVICE, 8, 1, Event)
    stream.operations.append(lambda: False)
    with pytest.raises(OSError, match="refused"), tables.lend(np.zeros(8, np.int64), stream):
        raise OSError("refused")
    with tables.lend(np.ones(8, np.int64), stream) as table:
        assert table.data_ptr() != tables._gpu.data_ptr()
    stream.operations.popleft()
    gpu.synchronize()
    with tables.lend(np.ones(8, np.int64), stream) as table:
        assert table.data_ptr() == tables._gpu.data_ptr()
