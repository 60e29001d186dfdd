"""Logging that cannot flood: one line per cause and minute."""

from __future__ import annotations

import logging
import threading
import time

_INTERVAL_SECONDS = 60.0
_lock = threading.Lock()
_last: dict[tuple[str, str], float] = {}


def log_once(logger: logging.Logger, key: str, message: str, *args: object) -> None:
    """Log `message % args` as a warning unless the same logger and `key` did so within the last minute.

    Args:
        logger: Where to log.
        key: Names the cause; keys must come from a small fixed set, never from data.
        message: A %-format string.
        *args: Its arguments.
    """
    now = time.monotonic()
    with _lock:
        if now - _last.get((logger.name, key), -_INTERVAL_SECONDS) < _INTERVAL_SECONDS:
            return
        _last[logger.name, key] = now
    logger.warning(message, *args)
