"""What each release tells a connector about scheduled requests: what is new since it was told last."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvtier.engine.sequence import Sequence, State, salt_id


@dataclass
class RequestData11:
    """Release 1.1."""

    request_id: int
    new_tokens: list[int]
    new_block_ids: list[int]
    computed_position: int


@dataclass
class RequestData12(RequestData11):
    """Release 1.2."""

    num_scheduled_tokens: int


@dataclass
class RequestData13(RequestData12):
    """Release 1.3."""

    priorities: list[int] | None = None
    cache_salt_id: int | None = None


@dataclass
class RequestDataMain(RequestData12):
    """The main branch."""

    block_hashes: list[int] = field(default_factory=list)
    priorities: list[int] | None = None
    cache_salt: str | None = None
    new_block_ids_by_layer_group: list[list[int]] = field(default_factory=list)


@dataclass
class SchedulerOutput:
    """Requests that run in the coming forward, those that appear for the first time apart."""

    new_requests: list[Any] = field(default_factory=list)
    cached_requests: list[Any] = field(default_factory=list)


@dataclass
class SchedulerOutputMain(SchedulerOutput):
    """The main branch's form."""

    attention_dp_rank: int | None = None


@dataclass(slots=True)
class _Told:
    tokens: int
    pages: list[int]


class Reporter:
    """Builds SchedulerOutput, remembering what each request has been reported with."""

    def __init__(self, version: str, tokens_per_block: int, by_group: bool) -> None:
        self._version = version
        self._tokens_per_block = tokens_per_block
        self._by_group = by_group
        self._told: dict[int, _Told] = {}
        self._matched: dict[int, int] = {}

    def matched(self, sequence: Sequence, tokens: int) -> None:
        """Note that the connector's promise counts in this iteration."""
        self._matched[sequence.id] = tokens

    def forget(self, sequence: Sequence) -> None:
        """Report this request as new when it comes again."""
        self._told.pop(sequence.id, None)
        self._matched.pop(sequence.id, None)

    def report(self, context: list[Sequence], generation: list[Sequence]) -> SchedulerOutput:
        """Describe a batch. Requests that load asynchronously are not in it."""
        output = SchedulerOutputMain() if self._version == "main" else SchedulerOutput()
        for sequence in context:
            new = sequence.id not in self._told
            data = self._describe(sequence)
            data.computed_position -= self._matched.get(sequence.id, 0)
            (output.new_requests if new else output.cached_requests).append(data)
        for sequence in generation:
            output.cached_requests.append(self._describe(sequence))
        self._matched.clear()
        return output

    def _describe(self, sequence: Sequence) -> Any:
        told = self._told.setdefault(sequence.id, _Told(0, [0] * sequence.num_groups))
        new_tokens = sequence.tokens[told.tokens :]
        told.tokens = len(sequence.tokens)
        pages = []
        for group in range(sequence.num_groups):
            known = sequence.pages(group)
            pages.append(known[told.pages[group] :])
            told.pages[group] = len(known)
        if sequence.state is State.CONTEXT:
            computed, scheduled = sequence.position, sequence.chunk
        else:
            computed, scheduled = len(sequence.tokens) - 1, 1
        flat = pages[0] if len(pages) == 1 else []
        if self._version == "1.1":
            return RequestData11(sequence.id, new_tokens, flat, computed)
        if self._version == "1.2":
            return RequestData12(sequence.id, new_tokens, flat, computed, scheduled)
        salt = sequence.request.cache_salt
        if self._version == "1.3":
            return RequestData13(
                sequence.id, new_tokens, flat, computed, scheduled, cache_salt_id=salt_id(salt)
            )
        data = RequestDataMain(sequence.id, new_tokens, flat, computed, scheduled, cache_salt=salt)
        if self._by_group:
            data.new_block_ids_by_layer_group = pages
        else:
            keys = sequence.keys(len(sequence.tokens) // self._tokens_per_block, self._tokens_per_block)
            data.block_hashes = [int.from_bytes(key[:8], "little") for key in keys]
        return data
