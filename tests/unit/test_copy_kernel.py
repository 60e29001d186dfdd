"""The kernel that copies ranges, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="needs Triton")

from kvtier.gpu.copy_kernel import copy_ranges  # noqa: E402

GUARD = 0x77


@pytest.mark.parametrize("programs", [1, 3, 1000])
@pytest.mark.parametrize("size", [16, 4096, 8192, 8192 + 16, 160_000])
def test_each_range_is_copied_and_nothing_beside_it(size, programs):
    count, room = 5, size + 64
    source = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, room), dtype=np.uint8))
    source = source.to(DEVICE)
    target = torch.full((count, room), GUARD, dtype=torch.uint8, device=DEVICE)
    order = [3, 0, 4, 1, 2]
    first = -source.data_ptr() % 16, -target.data_ptr() % 16
    rows = [
        [target[row].data_ptr() + first[1], source[order[row]].data_ptr() + first[0]] for row in range(count)
    ]
    span = 1024
    spans = -(-size // 8 // span)
    copy_ranges[(programs,)](torch.tensor(rows, device=DEVICE), spans, spans * count, size // 8, span)
    expected = torch.full_like(target, GUARD)
    for row in range(count):
        expected[row, first[1] : first[1] + size] = source[order[row], first[0] : first[0] + size]
    assert torch.equal(target, expected)
