"""What may get out of a method that the engine calls: nothing but a promise that cannot be kept."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.errors import KvTierError

_log = logging.getLogger(__name__)


class BrokenPromise(KvTierError):
    """Tokens were promised to the engine and cannot be delivered.

    No release of the engine can take a promise back: going on would serve wrong KV. So this one error is
    let out, and ends the engine's loop. It takes a lease that ran out between lookup and load (a minute, and
    then the blocks gone from all tiers), a page outside the pool, or a store closed under a running engine.
    """


def no_orders() -> tuple[Any, ...]:
    """Return nothing, which is what `shielded` methods answer that give orders."""
    return ()


class _Counting(Protocol):
    _counters: Counters


_Self = TypeVar("_Self", bound=_Counting)
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_Method = Callable[Concatenate[_Self, _Args], _Result]


def shielded(
    default: Callable[[], _Result],
) -> Callable[[_Method[_Self, _Args, _Result]], _Method[_Self, _Args, _Result]]:
    """Make a method answer `default()` where it would raise; count the error and log it.

    An exception in an engine-facing method ends the engine's loop or fails every active request, so only
    `BrokenPromise` passes. The method's class keeps its `Counters` in `_counters`.
    """

    def decorate(method: _Method[_Self, _Args, _Result]) -> _Method[_Self, _Args, _Result]:
        @functools.wraps(method)
        def call(self: _Self, /, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            try:
                return method(self, *args, **kwargs)
            except BrokenPromise:
                raise
            except Exception as error:  # noqa: BLE001 - the boundary to the engine's loop
                self._counters.add(f"errors_{method.__name__}")
                log_once(_log, method.__name__, "%s failed, kvtier steps aside: %r", method.__name__, error)
                return default()

        return call

    return decorate
