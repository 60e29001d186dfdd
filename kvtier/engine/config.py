"""What an engine is told when it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Version = Literal["1.1", "1.2", "1.3", "main"]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shape of a model, as far as the engine and its KV pool need it."""

    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of the reference engine.

    Attributes:
        num_blocks: Pages in the KV pool (in each layer group's pool).
        tokens_per_block: Tokens in a block; also the height of the tile in which the model computes.
        kv_dtype: torch's name of the KV element type.
        max_tokens_per_step: Token budget of one iteration, for chunked prefill; None: whole prompts.
        max_batch_size: Requests in flight at most.
        overlap: Launch the next forward before the last one's tokens are looked at.
        version: Which release's connector interface to speak.
        block_reuse: Keep freed blocks and match prompts against them. Off, the connector is never asked.
        layout: "flat" is the first KV cache manager with its one pool tensor. "groups" is the second (main
            only): pools are described by layer group, pages are allocated chunk by chunk, a request may be
            paused and replayed as new, an offer may be honoured only in part.
        num_groups: Layer groups under "groups", each with a page-index space of its own.
        window: Under "groups", the attention window in tokens of the last group's layers, or None.
        honour_blocks: Under "groups", take at most so many offered blocks; None: as the first chunk holds.
        tell_unused: Under "groups", tell the leader what of an offer is not taken (`cancel_load`) and which
            requests are paused (`request_reset`), as main does since September 2026.
        graph_decode: Leave the per-layer hooks out of pure generation steps, as a replayed graph does.
        announce_cancelled: Call `request_finished` also for cancelled and failed requests that have pages, as
            some builds of 1.2 do. Not all of their pages are computed.
        poison: Fill newly allocated pages with 0xFF before they are computed, as recycled memory might be.
        device: Where the KV pool lies, and the model must lie.
        tensor_parallel_size: Ranks, each with its heads' part of the pool, and all but the first in a process
            of its own. These start from Python's forkserver: a script needs its `__main__` guard.
    """

    num_blocks: int = 256
    tokens_per_block: int = 32
    kv_dtype: str = "bfloat16"
    max_tokens_per_step: int | None = None
    max_batch_size: int = 8
    overlap: bool = False
    version: Version = "1.2"
    block_reuse: bool = True
    layout: Literal["flat", "groups"] = "flat"
    num_groups: int = 2
    window: int | None = None
    honour_blocks: int | None = None
    tell_unused: bool = False
    graph_decode: bool = False
    announce_cancelled: bool = False
    poison: bool = True
    device: str = "cpu"
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        """Check that the settings go together.

        Raises:
            ValueError: They do not; the message says which.
        """
        if self.version not in ("1.1", "1.2", "1.3", "main"):
            raise ValueError(f"version {self.version!r} is not one of 1.1, 1.2, 1.3, main")
        if self.layout == "groups" and self.version != "main":
            raise ValueError('layout="groups" exists only on version="main"')
        if self.window is not None and self.layout != "groups":
            raise ValueError('window needs layout="groups"')
        if self.max_tokens_per_step is not None and self.max_tokens_per_step < self.tokens_per_block:
            raise ValueError("max_tokens_per_step must be at least tokens_per_block")
        for name in (
            "num_blocks",
            "tokens_per_block",
            "max_batch_size",
            "num_groups",
            "tensor_parallel_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive")

    @property
    def by_group(self) -> bool:
        """Whether the second KV cache manager's ways apply."""
        return self.layout == "groups"


@dataclass(frozen=True, slots=True)
class Multimodal:
    """One multimodal item of a prompt: eight int32 of content hash, first token's position, token count."""

    hash: Sequence[int]
    position: int
    length: int


@dataclass(frozen=True, slots=True)
class Request:
    """What a user submits. `eos_id` ends the output when it is generated; None: only the length does."""

    prompt: Sequence[int]
    max_new_tokens: int = 16
    cache_salt: str | None = None
    lora_id: int | None = None
    multimodal: Sequence[Multimodal] = ()
    eos_id: int | None = None


@dataclass(slots=True)
class Metrics:
    """What one request cost.

    Attributes:
        ttft_s: Seconds from submit to the first token, None before that.
        tokens_computed: Prompt tokens that went through the model (again, when a pause made it necessary).
        tokens_local: Prompt tokens whose KV was found in the engine's own pool.
        tokens_external: Prompt tokens whose KV the connector brought.
    """

    ttft_s: float | None = None
    tokens_computed: int = 0
    tokens_local: int = 0
    tokens_external: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """A request has ended: by "length", "eos", "cancelled" or "failed"."""

    request_id: int
    reason: str
    tokens: tuple[int, ...]
    error: Any = None
