"""Opens a process's part of the engine's store."""

from __future__ import annotations

import logging
from functools import partial

import torch

from kvtier._logging import log_once
from kvtier.config import Config
from kvtier.connector.shared import SharedStore, attach_store, share_store
from kvtier.errors import ConfigError
from kvtier.vllm.identity import EngineFacts

_log = logging.getLogger(__name__)


def open_part(config: Config, engine: EngineFacts, device: torch.device, member: int) -> SharedStore | None:
    """Open the store for a worker (its rank) or the scheduler (the number of ranks).

    With an agent each of them is a client of its own, wherever it runs: the scheduler is one more rank, which
    gives its hold on a lease up when the workers have their orders. Without one all are in this process.

    Args:
        config: The tiers.
        engine: The engine.
        device: Where the pool lies; for a GPU the arena is pinned.
        member: Whose part it is.

    Returns:
        The store; None, with a warning, where it cannot be opened: the engine then serves without.

    Raises:
        ConfigError: It cannot be opened as configured.
    """
    if config.agent.mode == "inprocess":
        opening = partial(share_store, config, engine.namespace, engine.layout, device)
    else:
        ranks = engine.ranks + 1
        opening = partial(
            attach_store, config, engine.namespace, engine.layout, device, engine.session, member, ranks
        )
    try:
        return opening()
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - without its store the engine still serves
        log_once(_log, "open", "the store cannot be opened, nothing is cached: %r", error)
        return None
