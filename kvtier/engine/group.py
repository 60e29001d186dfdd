"""Tensor-parallel ranks: which heads each of them holds, and how they exchange what they computed."""

from __future__ import annotations

from typing import Protocol


class Group(Protocol):
    """One rank's view of the ranks."""

    @property
    def rank(self) -> int:
        """Its place."""
        ...

    @property
    def ranks(self) -> int:
        """How many there are."""
        ...

    def all_gather(self, part: bytes) -> list[bytes]:
        """Give this rank's part and return the parts of all ranks, in order of rank.

        Raises:
            RankError: Another rank failed on the way here.
        """
        ...


class RankError(RuntimeError):
    """Another rank failed in this step; all ranks give it up."""


class RankLost(RuntimeError):
    """The process of a rank is gone: the engine cannot go on."""


def kv_heads_of(rank: int, ranks: int, kv_heads: int) -> list[int]:
    """Return the KV heads that a rank holds; every rank holds `ceil(kv_heads / ranks)` of them.

    With more ranks than heads, heads are held by several ranks each, as in TensorRT-LLM. With fewer, and a
    number that does not divide, which TensorRT-LLM refuses, the last ranks hold the last head again instead
    of padding.
    """
    if ranks >= kv_heads:
        return [rank * kv_heads // ranks]
    each = -(-kv_heads // ranks)
    return [min(rank * each + index, kv_heads - 1) for index in range(each)]


def first_copies(ranks: int, kv_heads: int) -> list[int]:
    """Return where each KV head first stands when all ranks' heads are put one after the other."""
    held = [head for rank in range(ranks) for head in kv_heads_of(rank, ranks, kv_heads)]
    return [held.index(head) for head in range(kv_heads)]
