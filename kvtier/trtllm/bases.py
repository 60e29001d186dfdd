"""The connector's base classes in the shape of TensorRT-LLM's, for where it is not installed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any


class KvCacheConnectorWorker(ABC):
    """The part of a connector that moves bytes, one on every rank."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        self._metadata: object = None
        super().__init__()

    def bind_connector_meta(self, metadata: object) -> None:
        """Take the metadata of the coming iteration."""
        self._metadata = metadata

    def get_connector_meta(self) -> object:
        """Return the metadata that is bound."""
        return self._metadata

    def _clear_connector_meta(self) -> None:
        self._metadata = None

    def register_forward_pass_callable(self) -> Callable[[], None] | None:
        """Return what the engine shall call at the end of each forward pass, or None."""
        return None

    @abstractmethod
    def register_kv_caches(self, kv_cache_tensor: Any) -> None:
        """Take the pool as one tensor."""

    def register_kv_cache_layout(self, layout: Any) -> None:
        """Take the pools as a description of byte ranges."""
        tensor = layout.as_single_pool_tensor()
        if tensor is None:
            raise NotImplementedError("this cache is not one pool tensor")
        self.register_kv_caches(tensor)

    @abstractmethod
    def start_load_kv(self, stream: Any) -> None:
        """Begin the loads of the bound metadata."""

    @abstractmethod
    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Wait until one layer is loaded."""

    @abstractmethod
    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Begin to save one layer."""

    @abstractmethod
    def wait_for_save(self, stream: Any) -> None:
        """Finish, or safely start, the saves of the bound metadata."""

    @abstractmethod
    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        """Return the requests whose asynchronous saves, and loads, have ended."""


class KvCacheConnectorScheduler(ABC):
    """The part of a connector that decides, on rank 0."""

    def __init__(self, llm_args: Any) -> None:
        self._llm_args = llm_args
        super().__init__()

    @abstractmethod
    def build_connector_meta(self, scheduler_output: Any) -> object:
        """Return the workers' orders for the coming iteration."""

    @abstractmethod
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens can be loaded beyond the local match, and whether asynchronously."""

    @abstractmethod
    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        """Return whether the request's blocks are still being saved."""

    def request_finished_by_layer_group(
        self, request: Any, cache_block_ids_by_layer_group: Sequence[list[int]]
    ) -> bool:
        """Do the same with one list of pages for each layer group."""
        (block_ids,) = cache_block_ids_by_layer_group
        return self.request_finished(request, block_ids)

    @abstractmethod
    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        """Take the block ids that a request was given."""

    def update_state_after_alloc_by_layer_group(
        self, request: Any, block_ids_by_layer_group: Sequence[list[int]]
    ) -> None:
        """Do the same with one list of pages for each layer group."""
        (block_ids,) = block_ids_by_layer_group
        self.update_state_after_alloc(request, block_ids)

    def wait_for_initialization(self) -> None:  # noqa: B027 - most connectors need nothing
        """Wait for what the connector needs before the first request."""
