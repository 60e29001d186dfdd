"""Holds a connector's two halves and speaks to them as the runtime does."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from kvtier.engine.config import EngineConfig
from kvtier.engine.model import Model
from kvtier.engine.ranks import Ranks
from kvtier.engine.sequence import RequestView, Sequence


class _Transfers:
    """Asynchronous loads, or saves: those begun since the last poll, and those under way on some rank."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._new: dict[int, Sequence] = {}
        self._told: dict[int, Sequence] = {}
        self._waiting: dict[int, set[int]] = {}

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._new or request_id in self._told

    def begin(self, sequence: Sequence) -> None:
        self._new[sequence.id] = sequence

    def tell(self) -> list[int]:
        """Return the ids that the workers have not been told of."""
        new, self._new = self._new, {}
        self._told.update(new)
        self._waiting.update({request_id: set(range(self._ranks)) for request_id in new})
        return list(new)

    def end(self, reports: Iterable[list[int]]) -> list[Sequence]:
        """Take the ids that each rank reports, and return the requests that all ranks have reported.

        Raises:
            KeyError: A rank names an id that it was not given, or names it twice.
        """
        over = []
        for rank, reported in enumerate(reports):
            for request_id in reported:
                self._waiting[request_id].remove(rank)
                if not self._waiting[request_id]:
                    del self._waiting[request_id]
                    over.append(self._told.pop(request_id))
        return over


class Connector:
    """A leader, a worker on each rank, and the asynchronous transfers that they have been told of.

    Attributes:
        leader: The instance of the leader class.
        worker: Rank 0's instance of the worker class.
        max_metadata_bytes: Size of the largest pickled metadata.
    """

    def __init__(
        self, leader_class: type, worker_class: type, llm_args: Any, config: EngineConfig, ranks: Ranks
    ) -> None:
        """Construct rank 0's halves at the same time, in two threads, as upstream does."""
        self._config = config
        self._ranks = ranks
        self._by_group = config.by_group
        self._views: dict[int, RequestView] = {}
        self._loading = _Transfers(config.tensor_parallel_size)
        self._saving = _Transfers(config.tensor_parallel_size)
        self.max_metadata_bytes = 0
        with ThreadPoolExecutor(2) as pool:
            leader = pool.submit(leader_class, llm_args)
            worker = pool.submit(worker_class, llm_args)
            self.leader: Any = leader.result()
            self.worker: Any = worker.result()

    def wait_for_initialization(self) -> None:
        """Let the leader wait for what it needs, on releases that do."""
        if self._config.version in ("1.3", "main"):
            self.leader.wait_for_initialization()

    def query(self, sequence: Sequence, computed: int) -> tuple[int, bool]:
        """Ask how many tokens beyond `computed` can be loaded, and whether asynchronously.

        Raises:
            RuntimeError: (0, True).
            AssertionError: A promise that leaves no prompt token to compute, or a negative one.
        """
        tokens, asynchronous = self.leader.get_num_new_matched_tokens(self.view(sequence), computed)
        if tokens == 0 and asynchronous:
            raise RuntimeError("load_kv_async must be False when num_tokens is 0")
        assert tokens >= 0, f"promised {tokens} tokens"
        assert computed + tokens < sequence.prompt_len, (
            f"prepopulated prompt length {computed} + {tokens} >= prompt length {sequence.prompt_len}"
        )
        return tokens, asynchronous

    def accept(self, sequence: Sequence, tokens: int, asynchronous: bool) -> None:
        """Note what the engine takes of an offer; an asynchronous load runs even if nothing is taken."""
        self.view(sequence).py_num_connector_matched_tokens = tokens
        if asynchronous:
            self._loading.begin(sequence)

    def cancel(self, sequence: Sequence, start: int, end: int) -> None:
        """Say which tokens of an offer are not going to be used, on builds that do."""
        if self._config.tell_unused and start < end:
            self.leader.cancel_load(self.view(sequence), start, end)

    def paused(self, sequence: Sequence) -> None:
        """Say that a request has lost its pages and will run again, on builds that do."""
        if self._config.tell_unused:
            self.leader.request_reset(self.view(sequence))

    def allocated(self, sequence: Sequence) -> None:
        """Tell the leader which pages the request has."""
        pages = [sequence.pages(group) for group in range(sequence.num_groups)]
        if self._by_group:
            self.leader.update_state_after_alloc_by_layer_group(self.view(sequence), pages)
        else:
            self.leader.update_state_after_alloc(self.view(sequence), pages[0])

    def begin_batch(self, output: Any) -> None:
        """Have the metadata built, send it through pickle to all workers, and let them start loading."""
        data = pickle.dumps(self.leader.build_connector_meta(output))
        self.max_metadata_bytes = max(self.max_metadata_bytes, len(data))
        self._ranks.begin(data)

    def finished(self, sequence: Sequence) -> bool:
        """Tell the leader that a request has ended by itself; True when its pages must stay for saving."""
        pages = [sequence.pages(group) for group in range(sequence.num_groups)]
        view = self.view(sequence)
        if self._by_group:
            saving = self.leader.request_finished_by_layer_group(view, pages)
        else:
            saving = self.leader.request_finished(view, pages[0])
        if saving:
            self._saving.begin(sequence)
        self._views.pop(sequence.id, None)
        return bool(saving)

    def transferring(self, sequence: Sequence) -> bool:
        """Whether an asynchronous load or save of this request is not known to be over."""
        return sequence.id in self._loading or sequence.id in self._saving

    def poll(self) -> tuple[list[Sequence], list[Sequence]]:
        """Ask the workers which saves and loads are over; this happens in every iteration.

        Returns:
            Those that all ranks have reported.

        Raises:
            KeyError: A worker names an id that it was not given, or names it twice.
        """
        reports = self._ranks.poll(self._saving.tell(), self._loading.tell())
        saved = self._saving.end(saved for saved, _ in reports)
        return saved, self._loading.end(loaded for _, loaded in reports)

    def view(self, sequence: Sequence) -> RequestView:
        """Return the request object that leader methods get for a request."""
        view = self._views.get(sequence.id)
        if view is None:
            view = self._views[sequence.id] = RequestView(sequence, self._config.version)
        return view

    def forget(self, sequence: Sequence) -> None:
        """Drop the request object of a request that ended without notice."""
        self._views.pop(sequence.id, None)


def make_llm_args(
    model: Model, config: EngineConfig, extra: Mapping[str, Any] | None, rank: int = 0
) -> SimpleNamespace:
    """Return what a rank's connector constructors get: the arguments of the LLM API that matter here.

    Without the real engine's helpers a process finds its rank in `parallel_config`.
    """
    ranks = config.tensor_parallel_size
    dtype = "fp8" if config.kv_dtype.startswith("float8") else config.kv_dtype
    arguments = SimpleNamespace(
        model=model.path,
        dtype="auto",
        backend="pytorch",
        tensor_parallel_size=ranks,
        pipeline_parallel_size=1,
        parallel_config=SimpleNamespace(world_size=ranks, tp_size=ranks, rank=rank),
        enable_attention_dp=False,
        enable_chunked_prefill=config.max_tokens_per_step is not None,
        disable_overlap_scheduler=not config.overlap,
        max_num_tokens=config.max_tokens_per_step,
        max_batch_size=config.max_batch_size,
        revision=None,
        kv_cache_config=SimpleNamespace(
            tokens_per_block=config.tokens_per_block,
            dtype=dtype,
            enable_block_reuse=config.block_reuse,
            enable_partial_reuse=False,
            host_cache_size=0,
            max_attention_window=None if config.window is None else [config.window],
        ),
        kv_connector_config=SimpleNamespace(connector_module=None, server_url=None),
    )
    for name, value in (extra or {}).items():
        setattr(arguments, name, value)
    return arguments
