"""Holds a connector's two halves and speaks to them as the runtime does."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from kvtier.engine.config import EngineConfig
from kvtier.engine.memory import KVMemory
from kvtier.engine.model import Model
from kvtier.engine.sequence import RequestView, Sequence

WARM_UP_FORWARDS = 2


class Connector:
    """One leader and one worker, and the asynchronous transfers that they have been told of.

    Attributes:
        leader: The instance of the leader class.
        worker: The instance of the worker class.
        metadata_bytes: Size of the last pickled metadata.
        max_metadata_bytes: Size of the largest.
    """

    def __init__(self, leader_class: type, worker_class: type, llm_args: Any, config: EngineConfig) -> None:
        """Construct both halves at the same time, in two threads, as upstream does."""
        self._config = config
        self._by_group = config.by_group
        self._views: dict[int, RequestView] = {}
        self._new_loading: dict[int, Sequence] = {}
        self._new_saving: dict[int, Sequence] = {}
        self._loading: dict[int, Sequence] = {}
        self._saving: dict[int, Sequence] = {}
        self.metadata_bytes = self.max_metadata_bytes = 0
        with ThreadPoolExecutor(2) as pool:
            leader = pool.submit(leader_class, llm_args)
            worker = pool.submit(worker_class, llm_args)
            self.leader: Any = leader.result()
            self.worker: Any = worker.result()
        self._forward_pass_callable: Any = None

    def warm_up(self) -> None:
        """Fetch the forward-pass callable and fire it as warm-up forwards do: before any registration."""
        if self._config.version != "1.1":
            self._forward_pass_callable = self.worker.register_forward_pass_callable()
        for _ in range(WARM_UP_FORWARDS):
            self.forward_passed()

    def register(self, memory: KVMemory) -> None:
        """Show the pool to the worker."""
        if memory.layout is not None:
            self.worker.register_kv_cache_layout(memory.layout)
        else:
            self.worker.register_kv_caches(memory.tensor)
        if self._config.version in ("1.3", "main"):
            self.leader.wait_for_initialization()

    def forward_passed(self) -> None:
        """Fire the forward-pass callable, if there is one."""
        if self._forward_pass_callable is not None:
            self._forward_pass_callable()

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
            self._new_loading[sequence.id] = sequence

    def allocated(self, sequence: Sequence) -> None:
        """Tell the leader which pages the request has."""
        pages = [sequence.pages(group) for group in range(sequence.num_groups)]
        if self._by_group:
            self.leader.update_state_after_alloc_by_layer_group(self.view(sequence), pages)
        else:
            self.leader.update_state_after_alloc(self.view(sequence), pages[0])

    def begin_batch(self, output: Any, stream: Any) -> None:
        """Have the metadata built, send it through pickle to the worker, and let it start loading."""
        data = pickle.dumps(self.leader.build_connector_meta(output))
        self.metadata_bytes = len(data)
        self.max_metadata_bytes = max(self.max_metadata_bytes, len(data))
        # The bytes come from the line above, not from outside.
        self.worker.bind_connector_meta(pickle.loads(data))  # noqa: S301
        self.worker.start_load_kv(stream)

    def finished(self, sequence: Sequence) -> bool:
        """Tell the leader that a request has ended by itself; True when its pages must stay for saving."""
        pages = [sequence.pages(group) for group in range(sequence.num_groups)]
        view = self.view(sequence)
        if self._by_group:
            saving = self.leader.request_finished_by_layer_group(view, pages)
        else:
            saving = self.leader.request_finished(view, pages[0])
        if saving:
            self._new_saving[sequence.id] = sequence
        self._views.pop(sequence.id, None)
        return bool(saving)

    def transferring(self, sequence: Sequence) -> bool:
        """Whether an asynchronous load or save of this request is not known to be over."""
        transfers = (self._new_loading, self._new_saving, self._loading, self._saving)
        return any(sequence.id in requests for requests in transfers)

    def poll(self) -> tuple[list[Sequence], list[Sequence]]:
        """Ask the worker which saves and loads are over; this happens in every iteration.

        Raises:
            KeyError: The worker names an id that it was not given, or names it twice.
        """
        finished, started = list(self._new_saving), list(self._new_loading)
        self._saving.update(self._new_saving)
        self._loading.update(self._new_loading)
        self._new_saving, self._new_loading = {}, {}
        saved, loaded = self.worker.get_finished(finished, started)
        return [self._saving.pop(i) for i in saved], [self._loading.pop(i) for i in loaded]

    def view(self, sequence: Sequence) -> RequestView:
        """Return the request object that leader methods get for a request."""
        view = self._views.get(sequence.id)
        if view is None:
            view = self._views[sequence.id] = RequestView(sequence, self._config.version)
        return view

    def forget(self, sequence: Sequence) -> None:
        """Drop the request object of a request that ended without notice."""
        self._views.pop(sequence.id, None)


def make_llm_args(model: Model, config: EngineConfig, extra: Mapping[str, Any] | None) -> SimpleNamespace:
    """Return what connector constructors get: the arguments of the LLM API that matter here."""
    dtype = "fp8" if config.kv_dtype.startswith("float8") else config.kv_dtype
    arguments = SimpleNamespace(
        model=model.path,
        dtype="auto",
        backend="pytorch",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
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


def current_stream(device: torch.device) -> Any:
    """Return the current CUDA stream, or None on a CPU."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
