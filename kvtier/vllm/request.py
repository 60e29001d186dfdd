"""What the scheduler's half knows about one request: identity, tokens, hashes, pages, and its promise."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtier.connector.adapters import Adapters
from kvtier.connector.hash_cache import HashCache, extend_hashes
from kvtier.hashing import MultimodalItem, chain_root


@dataclass(frozen=True, slots=True)
class Identity:
    """What, besides its tokens, decides the KV of a request.

    Attributes:
        salt: The cache salt, None without.
        lora: A name for the adapter's content, None without.
        items: The multimodal items of the prompt, in order.
    """

    salt: str | None = None
    lora: str | None = None
    items: tuple[MultimodalItem, ...] = ()

    @classmethod
    def of(cls, request: Any, adapters: Adapters) -> Identity | None:
        """Read a request; None if its KV must be neither served from nor saved to the store.

        That is so, too, until the files of its adapter have been read.
        """
        if request.prompt_token_ids is None or getattr(request, "prompt_embeds", None) is not None:
            return None
        if request.pooling_params is not None or getattr(request, "resumable", False):
            # All of a prompt's outputs are wanted, or its tokens may be replaced later.
            return None
        lora = None
        if request.lora_request is not None:
            if getattr(request.lora_request, "load_inplace", False):
                # Its files are read again, and may have changed.
                return None
            lora = adapters.name(int(request.lora_request.lora_int_id), str(request.lora_request.lora_path))
            if lora is None:
                return None
        items = tuple(
            MultimodalItem(
                str(feature.identifier).encode(),
                int(feature.mm_position.offset),
                int(feature.mm_position.length),
            )
            for feature in request.mm_features or ()
        )
        return cls(request.cache_salt, lora, items)


@dataclass(slots=True)
class Promise:
    """Blocks that the engine was told it can load.

    Attributes:
        lease: The claim on their slots.
        first: Ordinal of the first block.
        slots: Slot of each block, in order.
        taken: Whether the engine has allocated pages for them.
    """

    lease: int
    first: int
    slots: tuple[int, ...]
    taken: bool = False


@dataclass(slots=True)
class RequestState:
    """One request.

    Attributes:
        request: The engine's object, whose list of tokens only grows.
        identity: None if nothing of it may be looked up or saved.
        root: Where its hash chain starts.
        tokens_per_block: Tokens in a block.
        tokens: Tokens known so far.
        hashes: Hashes of the whole blocks of `tokens`, as far as they were needed.
        pages: Its block ids in the engine's pool.
        valid: Leading tokens whose KV is in the pool after the steps ordered so far.
        saved: The last step in which blocks of it were saved.
        handled: Leading blocks that need no more thought about saving.
        drafted: Whether drafts were ever scheduled for it.
        promise: What is promised and not yet loaded.
        deadline: Until when it pays to wait for blocks that are on their way, monotonic seconds; None when
            nothing is waited for.
        expected: How many blocks each tier had when the wait began.
    """

    request: Any
    identity: Identity | None
    root: bytes
    tokens_per_block: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[bytes] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    valid: int = 0
    saved: int = 0
    handled: int = 0
    drafted: bool = False
    promise: Promise | None = None
    deadline: float | None = None
    expected: Mapping[str, int] = field(default_factory=dict)
    _cache: HashCache | None = None

    @classmethod
    def start(
        cls,
        request: Any,
        adapters: Adapters,
        namespace: bytes,
        tokens_per_block: int,
        cache: HashCache,
        era: str | None,
    ) -> RequestState:
        """Return the state of a request that nothing was heard of before.

        Args:
            request: The engine's object.
            adapters: Names the adapters of the engine.
            namespace: Id of the namespace.
            tokens_per_block: Tokens in a block.
            cache: Hashes of other requests of the namespace.
            era: What tells this time of the engine's life from others, None from its start to a reset.
        """
        identity = Identity.of(request, adapters)
        root = b""
        if identity is not None:
            root = chain_root(namespace, identity.salt, identity.lora)
            if era is not None:
                root = chain_root(root, era)
        state = cls(request, identity, root, tokens_per_block)
        if identity is not None and not identity.items:
            state._cache = cache
        return state

    def see_tokens(self) -> int:
        """Take what the engine has appended to the tokens; returns how many there are."""
        listed = self.request.all_token_ids
        if len(listed) > len(self.tokens):
            self.tokens.extend(listed[len(self.tokens) :])
        return len(self.tokens)

    def hash_through(self, blocks: int) -> list[bytes]:
        """Hash up to `blocks` whole blocks of the tokens known, and return all hashes so far."""
        items = self.identity.items if self.identity else ()
        size, cache = self.tokens_per_block, self._cache
        return extend_hashes(self.hashes, self.root, self.tokens, blocks, size, items, cache)

    def hash_before(self, block: int) -> bytes:
        """Return the parent hash of a block whose predecessor is hashed."""
        return self.hashes[block - 1] if block else self.root

    def advance(self, computed: int, scheduled: int, drafts: Sequence[int] | None) -> None:
        """Take what is scheduled for the coming step.

        Args:
            computed: Tokens whose KV was there before, by the engine's count.
            scheduled: Tokens of the step.
            drafts: Those among them that may be rejected. With drafts the engine's count runs ahead, too; a
                token that was sampled proves that all before it were computed, though after a pause they
                have to be computed again.
        """
        self.valid = computed + scheduled
        if drafts or self.drafted:
            self.drafted = True
            certain = max(self.request.num_prompt_tokens, self.see_tokens() - 1)
            self.valid = min(self.valid, certain)

    def origins(self, sources: Mapping[str, int]) -> dict[str, int]:
        """Return where blocks came from that a lookup found in the end.

        Args:
            sources: What the last lookup said of them. What was waited for lay in memory by then.
        """
        left, origins = sum(sources.values()), {}
        for tier, count in (self.expected or sources).items():
            origins[tier] = min(count, left)
            left -= origins[tier]
        if left:
            origins["memory"] = origins.get("memory", 0) + left
        self.expected = {}
        return origins

    def savable(self) -> int:
        """Return how many leading blocks are whole, known by their tokens, and stand in a page.

        The engine may run ahead of the tokens that it knows; the last blocks then wait for their names.
        """
        known = min(self.valid, self.see_tokens())
        return min(known // self.tokens_per_block, len(self.pages))
