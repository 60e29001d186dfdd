"""Providing the arena's pages before it is pinned."""

from __future__ import annotations

import os

import numpy as np
import pytest

from kvtier.gpu.pin import populate
from kvtier.tiers.arena import MappedMemory


@pytest.mark.parametrize("pages", [1, 3, 1026])
def test_all_pages_are_provided_and_nothing_changes(pages):
    memory = MappedMemory.anonymous(pages * 4096)
    try:
        words = np.frombuffer(memory.buffer(), np.uint64)
        words[:8] = range(8)
        populate(words.ctypes.data, words.nbytes)
        assert os.fstat(memory.fd).st_blocks * 512 == memory.length
        assert words[:8].tolist() == list(range(8))
        assert not words[8:].any()
        del words
    finally:
        memory.close()


def test_without_it_they_are_not():
    """Shows that the test above can fail."""
    memory = MappedMemory.anonymous(1026 * 4096)
    try:
        assert os.fstat(memory.fd).st_blocks * 512 < memory.length
    finally:
        memory.close()
