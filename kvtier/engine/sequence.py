"""One request on its way through the engine, and what of it a connector may see."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence as Seq
from enum import Enum

from kvtier.engine.config import Metrics, Multimodal, Request
from kvtier.engine.pool import NO_PAGE, Block


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    LOADING = "loading"
    CONTEXT = "context"
    GENERATION = "generation"
    ENDED = "ended"


class Sequence:
    """The engine's record of one request.

    Attributes:
        tokens: Prompt and generated tokens that the host knows.
        device_tokens: The same, and tokens that were sampled but not looked at yet (overlap).
        prompt_len: Tokens to prefill; a replay after a pause prefills what was generated, too.
        blocks: Blocks held, in order.
        position: Next prompt token to compute.
        chunk: Prompt tokens to compute in the coming forward.
        valid: Leading tokens whose KV stands in the pool.
        passed: By group, leading blocks that its attention window has passed.
        external: Tokens that the connector promised for the current allocation.
    """

    def __init__(self, request_id: int, request: Request, num_groups: int) -> None:
        self.id = request_id
        self.request = request
        self.tokens = list(request.prompt)
        self.device_tokens = list(request.prompt)
        self.state = State.WAITING
        self.submitted = time.perf_counter()
        self.metrics = Metrics()
        self._keys: list[bytes] = []
        self.num_groups = num_groups
        self.reset()

    def reset(self) -> None:
        """Begin anew with what the host knows as the prompt; the blocks have been released."""
        self.blocks: list[Block] = []
        self.prompt_len = len(self.tokens)
        self.position = self.chunk = self.valid = self.external = 0
        self.passed = [0] * self.num_groups

    @property
    def generated(self) -> list[int]:
        """The output so far."""
        return self.tokens[len(self.request.prompt) :]

    def pages(self, group: int) -> list[int]:
        """Return the page of each block in one group, -1 where there is none any more."""
        passed = self.passed[group]
        return [NO_PAGE if i < passed else block.pages[group] for i, block in enumerate(self.blocks)]

    def keys(self, count: int, tokens_per_block: int) -> list[bytes]:
        """Return the reuse keys of the first `count` blocks of `tokens`."""
        parent = self._keys[-1] if self._keys else self._root()
        for index in range(len(self._keys), count):
            start = index * tokens_per_block
            data = repr(self.tokens[start : start + tokens_per_block]).encode()
            digest = hashlib.blake2b(parent + data, digest_size=16)
            for item in self.request.multimodal:
                if item.position < start + tokens_per_block and start < item.position + item.length:
                    digest.update(repr((item.hash, item.position - start)).encode())
            parent = digest.digest()
            self._keys.append(parent)
        return self._keys[:count]

    def _root(self) -> bytes:
        return repr((self.request.cache_salt, self.request.lora_id)).encode()


class RequestView:
    """The request object that leader methods get: the attributes of upstream's base class, nothing else."""

    def __init__(self, sequence: Sequence, version: str) -> None:
        self._sequence = sequence
        request = sequence.request
        self.request_id = sequence.id
        self.lora_task_id = request.lora_id
        if version == "main":
            self.cache_salt = request.cache_salt
        else:
            self.cache_salt_id = salt_id(request.cache_salt)
        items: Seq[Multimodal] = request.multimodal
        self.multimodal_hashes = [list(item.hash) for item in items] or None
        self.multimodal_positions = [item.position for item in items] or None
        self.multimodal_lengths = [item.length for item in items] or None
        self.is_generation_only_request = False
        self.py_num_connector_matched_tokens = 0

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return self._sequence.prompt_len

    @property
    def context_current_position(self) -> int:
        """Next prompt token to compute."""
        return self._sequence.position

    def get_tokens(self, beam: int) -> list[int]:
        """Return a copy of the prompt and what was generated so far."""
        if beam != 0:
            raise IndexError(f"there is no beam {beam}")
        return list(self._sequence.tokens)


def salt_id(cache_salt: str | None) -> int | None:
    """Return the integer that releases before main derive from a cache salt."""
    if cache_salt is None:
        return None
    return int.from_bytes(hashlib.blake2b(cache_salt.encode(), digest_size=8).digest(), "little")
