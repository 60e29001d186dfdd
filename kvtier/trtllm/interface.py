"""The base classes that the engine expects: its own where it is installed, ours of the same shape elsewhere.

Releases 1.1 and 1.2 keep them in `pyexecutor.kv_cache_connector`, later ones in `pyexecutor.connectors`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kvtier.trtllm import bases
from kvtier.trtllm.fields import as_int

if TYPE_CHECKING:
    from kvtier.trtllm.bases import KvCacheConnectorScheduler, KvCacheConnectorWorker

_PACKAGE = "tensorrt_llm._torch.pyexecutor"
_PLACES = (f"{_PACKAGE}.connectors.kv_cache_connector", f"{_PACKAGE}.kv_cache_connector")


def _upstream() -> Any:
    for place in _PLACES:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as missing:
            # Only the absence of the module itself, or of a package above it, means "look elsewhere".
            if missing.name is None or not f"{place}.".startswith(f"{missing.name}."):
                raise
    return bases


if not TYPE_CHECKING:
    _module = _upstream()
    KvCacheConnectorScheduler = _module.KvCacheConnectorScheduler
    KvCacheConnectorWorker = _module.KvCacheConnectorWorker


def rank_here() -> int | None:
    """Return this process's rank as the engine's own helper tells it, None where there is none."""
    return _ask("mpi_rank")


def world_size() -> int | None:
    """Return the number of ranks as the engine's own helper tells it, None where there is none."""
    return _ask("mpi_world_size")


def _ask(helper: str) -> int | None:
    try:
        value = getattr(importlib.import_module("tensorrt_llm._utils"), helper)()
    except (ImportError, AttributeError):
        return None
    return as_int(value)


__all__ = ["KvCacheConnectorScheduler", "KvCacheConnectorWorker", "rank_here", "world_size"]
