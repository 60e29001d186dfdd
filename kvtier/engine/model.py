"""What the engine asks of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtier.engine.config import ModelSpec, Request
from kvtier.engine.group import Group
from kvtier.engine.memory import KVMemory

LayerHook = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Span:
    """A run of one request's tokens to compute.

    Attributes:
        tokens: All tokens of the request, at least `end` of them.
        start: Position of the first token to compute; the KV of everything before it stands in the pool.
        end: Position after the last one.
        pages: By layer group, the page of each block up to `end`; -1 where the window has passed it.
        sample: Whether the token after `end - 1` is wanted.
        request: Whose tokens they are.
    """

    tokens: Sequence[int]
    start: int
    end: int
    pages: Sequence[Sequence[int]]
    sample: bool
    request: Request


class Model(Protocol):
    """A model that keeps its KV in a paged pool.

    Attributes:
        spec: Its shape.
        path: Directory with `config.json` and weights, as a connector finds it in `llm_args.model`.
    """

    spec: ModelSpec
    path: str

    def forward(
        self, spans: Sequence[Span], memory: KVMemory, before_layer: LayerHook, after_layer: LayerHook
    ) -> list[int | None]:
        """Compute spans, writing their KV into `memory` and reading all context from there.

        What comes out depends only on the tokens up to each position and on the bytes in the pool, never on
        how the work was cut into spans or which spans ran together.

        Returns:
            For each span the next token, or None where none was wanted; ranks other than the first may
            return anything.
        """
        ...

    def shard(self, group: Group) -> Model:
        """Return the part of the model that one of several ranks computes; its spec tells its share.

        Its `forward` runs on all ranks of the group at the same time.
        """
        ...
