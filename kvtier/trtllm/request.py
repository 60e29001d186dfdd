"""What the leader knows about one request: identity, tokens, hashes, pages, and what is promised to it."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvtier._logging import log_once
from kvtier.connector.adapters import Adapters
from kvtier.connector.hash_cache import HashCache, extend_hashes
from kvtier.connector.passes import Pages
from kvtier.hashing import MultimodalItem, chain_root
from kvtier.trtllm.fields import as_int, as_list, as_text, dig, is_given
from kvtier.trtllm.pool import NO_PAGE, PageGroup

_log = logging.getLogger(__name__)

_UNNAMED_CONTENT = (
    "prompt_embedding_table",
    "multimodal_embedding",
    "multimodal_positions",
    "multimodal_lengths",
    "py_multimodal_data",
    "encoder_tokens",
)
"""Fields whose content the prompt's tokens do not name; multimodal hashes do."""

_WHOLE_PROMPT_OUTPUTS = (
    "return_context_logits",
    "py_return_context_logits",
    "return_encoder_output",
    "py_prompt_logprobs",
)
"""Outputs for every prompt token, which only a computed prompt has."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What, besides its tokens, decides the KV of a request.

    Attributes:
        salt: The cache salt (text on main, an integer on 1.3), None without.
        lora: The name of the LoRA adapter, None without.
        items: The multimodal items of the prompt, in order.
    """

    salt: str | int | None = None
    lora: str | None = None
    items: tuple[MultimodalItem, ...] = ()

    @classmethod
    def of(cls, request: object, adapters: Adapters) -> Identity | None:
        """Read a request; None if its KV must be neither served from nor saved to the store, at least now."""
        if any(is_given(getattr(request, name, None)) for name in _WHOLE_PROMPT_OUTPUTS):
            return None
        items = _multimodal_items(request)
        if items is None:
            return None
        lora, lora_id = None, as_int(getattr(request, "lora_task_id", None))
        if lora_id is not None:
            lora = adapters.name(lora_id, as_text(getattr(request, "py_lora_path", None)))
            if lora is None:
                return None
        return cls(salt_of(request), lora, items)


def salt_of(source: object) -> str | int | None:
    """Return the cache salt of a request or of a RequestData, None without one."""
    for name in ("cache_salt", "cache_salt_id"):
        salt = getattr(source, name, None)
        if isinstance(salt, str) or as_int(salt) is not None:
            return salt
    return None


def _multimodal_items(request: object) -> tuple[MultimodalItem, ...] | None:
    hashes = as_list(getattr(request, "multimodal_hashes", None))
    if not hashes:
        unnamed = any(is_given(getattr(request, name, None)) for name in _UNNAMED_CONTENT)
        return None if unnamed else ()
    starts = as_list(getattr(request, "multimodal_positions", None)) or []
    lengths = as_list(getattr(request, "multimodal_lengths", None)) or []
    if is_given(getattr(request, "prompt_embedding_table", None)) or not len(hashes) == len(starts) == len(
        lengths
    ):
        return None
    # Content hashes come as lists of int32.
    digests = [b"".join(int(part).to_bytes(8, "little", signed=True) for part in item) for item in hashes]
    return tuple(
        MultimodalItem(digest, int(start), int(length))
        for digest, start, length in zip(digests, starts, lengths, strict=True)
    )


def token_array(tokens: Iterable[int]) -> array[int]:
    """Return token ids as they are kept: four bytes each, since cancelled prompts stay for a while."""
    return array("i", tokens)


@dataclass(slots=True)
class Promise:
    """Blocks that the engine was told it can load.

    Attributes:
        lease: The claim on their slots.
        first: Ordinal of the first block.
        slots: Slot of each block, in order.
    """

    lease: int
    first: int
    slots: tuple[int, ...]

    def cut(self, start: int, end: int, tokens_per_block: int) -> None:
        """Leave out the blocks at the head or the tail that lie in tokens `[start, end)` as a whole.

        From the middle nothing is taken: to load more than is used does no harm.
        """
        head, tail = -(-start // tokens_per_block) - self.first, end // tokens_per_block - self.first
        if head <= 0:
            cut = min(max(tail, 0), len(self.slots))
            self.first, self.slots = self.first + cut, self.slots[cut:]
        elif tail >= len(self.slots):
            self.slots = self.slots[:head]


@dataclass(slots=True)
class RequestState:
    """One request.

    Attributes:
        identity: None if nothing of it may be saved.
        root: Where its hash chain starts.
        tokens_per_block: Tokens in a block.
        tokens: Tokens known so far.
        hashes: Hashes of the whole blocks of `tokens`, as far as they were needed.
        pages: For each list of pages that the engine keeps, the page of each block.
        prompt: Tokens at the first appearance in a batch with the present pages, all of which that pass and
            the following prefill; None before it.
        computed: Leading tokens whose KV stood in the pool before the pass that was scheduled last.
        fresh: First block whose page was reported with that pass.
        handled: Leading blocks that slots were asked for, or that cannot be saved.
        placement: Goes up whenever its blocks may lie in other pages than before.
        turn: The last pass that it was scheduled in.
        promise: What is promised and not yet loaded.
        request: The engine's object, while a promise is open.
        seen: When the request was last heard of, monotonic seconds.
        looked_at: When that was last looked at.
    """

    identity: Identity | None
    root: bytes
    tokens_per_block: int
    tokens: array[int] = field(default_factory=lambda: array("i"))
    hashes: list[bytes] = field(default_factory=list)
    pages: list[list[int]] = field(default_factory=list)
    prompt: int | None = None
    computed: int = 0
    fresh: int = 0
    handled: int = 0
    placement: int = 0
    turn: int = 0
    promise: Promise | None = None
    request: Any = None
    seen: float = 0.0
    looked_at: float = 0.0
    _reported: list[int] = field(default_factory=list)
    # Whether the next step is likely to be one of a single token, with no more than that to note; and whether
    # pages were reported with the last one.
    _decoding: bool = False
    _turned: bool = False
    _cache: HashCache | None = None

    @classmethod
    def start(
        cls,
        identity: Identity | None,
        namespace: bytes,
        tokens_per_block: int,
        cache: HashCache | None = None,
    ) -> RequestState:
        """Return the state of a request that nothing is known of but its identity.

        Args:
            identity: What decides its KV besides its tokens.
            namespace: Id of the namespace.
            tokens_per_block: Tokens in a block.
            cache: Hashes of other requests of the namespace.
        """
        salt, lora = (identity.salt, identity.lora) if identity else (None, None)
        state = cls(identity, chain_root(namespace, salt, lora), tokens_per_block)
        if identity is not None and not identity.items:
            state._cache = cache
        return state

    def see_tokens(self, tokens: array[int]) -> None:
        """Take a request's whole list of tokens; hashes survive if it continues what was known."""
        if not self.continues_in(tokens):
            self.hashes.clear()
            self.handled = 0
            self.placement += 1
        self.tokens = tokens

    def continues_in(self, tokens: array[int]) -> bool:
        """Say whether `tokens` begin with all that were known."""
        return tokens[: len(self.tokens)] == self.tokens

    def see_allocation(self, pages: list[list[int]]) -> None:
        """Take the pages of a new allocation, by layer group; all tokens are prefilled anew."""
        self.pages = pages
        self.prompt = None
        self._decoding = False
        self.placement += 1

    def hash_through(self, blocks: int) -> list[bytes]:
        """Hash up to `blocks` whole blocks of the tokens known, and return all hashes so far."""
        items = self.identity.items if self.identity else ()
        size, cache = self.tokens_per_block, self._cache
        return extend_hashes(self.hashes, self.root, self.tokens, blocks, size, items, cache)

    def hash_before(self, block: int) -> bytes:
        """Return the parent hash of a block whose predecessor is hashed."""
        return self.hashes[block - 1] if block else self.root

    def advance(self, data: Any, is_new: bool) -> int:
        """Take what the engine says about the coming pass.

        Args:
            data: The engine's RequestData.
            is_new: Whether it stands among the new requests: nothing told before counts any more.

        Returns:
            Leading tokens whose KV will be valid after the pass. Never too many; too few where the release
            tells less than is needed, and then the next pass makes up for it.
        """
        if is_new:
            self.see_tokens(token_array(data.new_tokens))
            self.prompt, self._reported = None, []
            self._decoding = False
            self.placement += 1
        else:
            self.tokens.extend(data.new_tokens)
        if self.prompt is None:
            self.prompt = len(self.tokens)
            if self.identity and salt_of(data) not in (None, self.identity.salt):
                self.identity = None
        grouped = self._take_pages(data, is_new)
        self.computed = self._computed(as_int(data.computed_position) or 0, grouped)
        scheduled = as_int(getattr(data, "num_scheduled_tokens", None))
        return min(self._valid_after(scheduled), len(self.tokens))

    def step(self, data: Any) -> int:
        """Do what `advance` does for a request that was scheduled before; quickly where it only decodes."""
        new, position = data.new_tokens, data.computed_position
        if (
            self._decoding
            and self.promise is None
            and len(new) == 1
            and type(position) is int
            and getattr(data, "num_scheduled_tokens", None) == 1
            and not getattr(data, "new_block_ids_by_layer_group", None)
        ):
            if data.new_block_ids or self._turned:
                self._turn(data.new_block_ids)
            tokens = self.tokens
            tokens.append(new[0])
            self.computed = position
            return position + 1 if position < len(tokens) else len(tokens)
        valid = self.advance(data, is_new=False)
        self._decoding = self._turned = (
            self.computed >= (self.prompt or 0) and len(self._reported) == len(self.pages) == 1
        )
        return valid

    def settled(self, total: int) -> int:
        """Return how many leading tokens of a finished request with `total` tokens have valid KV.

        A token that was sampled proves that all before it were computed. Without one the request was
        stopped in its prefill, of which the last pass may have failed.
        """
        if self.prompt is None:
            return 0
        return total - 1 if total > self.prompt else min(self.computed, total)

    def pages_of(self, block: int, groups: Sequence[PageGroup]) -> Pages | None:
        """Return a block's page in each group, None as long as one of them was not reported."""
        try:
            return tuple([self.pages[group.id][block] for group in groups])
        except IndexError:
            return None

    def can_save(self, block: int, pages: Pages, groups: Sequence[PageGroup]) -> bool:
        """Say whether a block stands in all its pages: none missing, none passed by its attention window.

        A page that the window has passed is given to somebody else, and the engine does not say so; only
        pages reported for this very pass, and those well inside the window, are certain.
        """
        if NO_PAGE in pages:
            return False
        if block >= self.fresh:
            return True
        start = block * self.tokens_per_block
        return all(group.window is None or start > self.computed - group.window for group in groups)

    def _turn(self, ids: Sequence[int]) -> None:
        """Take the pages, if any, that a pass adds to the only list of them; `_turned` if there are."""
        start = self.fresh = self._reported[0]
        if ids:
            self._append(0, ids)
        self._turned = start != self._reported[0]

    def _append(self, group: int, ids: Sequence[int]) -> None:
        known, start = self.pages[group], self._reported[group]
        if len(known) < start:
            known.extend([NO_PAGE] * (start - len(known)))
        known[start : start + len(ids)] = ids
        self._reported[group] = start + len(ids)

    def _take_pages(self, data: Any, is_new: bool) -> bool:
        by_group = getattr(data, "new_block_ids_by_layer_group", None)
        if not by_group and not data.new_block_ids and len(self._reported) == len(self.pages) == 1:
            self.fresh = self._reported[0]
            return False
        if isinstance(by_group, Mapping):
            by_group = [by_group.get(group, []) for group in range(max(by_group, default=-1) + 1)]
        lists = by_group if isinstance(by_group, (list, tuple)) and by_group else [data.new_block_ids]
        if is_new and any(lists):
            self.pages = [[] for _ in lists]
        while len(self.pages) < len(lists):
            self.pages.append([])
        while len(self._reported) < len(lists):
            self._reported.append(0)
        self.fresh = min(self._reported[: len(lists)])
        for group, ids in enumerate(lists):
            self._append(group, ids)
        return lists is by_group

    def _computed(self, position: int, grouped: bool) -> int:
        """Return the leading tokens that are valid once the promise, if any, is loaded.

        The position leaves out what was promised, in the pass that the promise is for. V1 honours all of it,
        or, with block reuse off, nothing, and then its positions lie as much too low. V2 may honour any part,
        and notes on the request how much.
        """
        promise = self.promise
        if promise is None:
            return max(0, position)
        start = promise.first * self.tokens_per_block
        offered = len(promise.slots) * self.tokens_per_block
        honoured = offered
        if grouped:
            honoured = as_int(dig(self.request, "py_num_connector_matched_tokens")) or 0
        return max(0, position, min(position + honoured, start + offered))

    def _valid_after(self, scheduled: int | None) -> int:
        if scheduled is None:
            return self.computed
        end = self.computed + scheduled
        if scheduled <= 1 or end <= (self.prompt or 0):
            return end
        # More than one token beyond the prompt: drafts, of which any number may be rejected.
        return self.computed


def note_unsupported(identity: Identity | None) -> None:
    """Say once a minute that there are requests which kvtier leaves alone."""
    if identity is None:
        log_once(
            _log,
            "unsupported",
            "requests are not cached that have content without a hash, that want logits of the whole prompt,"
            " or whose LoRA adapter has not been read yet",
        )
