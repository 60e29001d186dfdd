"""What a forked child must not keep open.

To the agent, and to the kernel's file locks, a process lives as long as anybody has its descriptors: a child
that outlived its killed parent would keep the parent's leases, or the lock of an agent that has ended.
Programs that a process starts lose them by O_CLOEXEC, children that only fork do not.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Protocol


class _Closable(Protocol):
    def close(self) -> None: ...


_kept: weakref.WeakSet[_Closable] = weakref.WeakSet()


def close_in_children(thing: _Closable) -> None:
    """Have a socket or file closed in every child that this process forks from now on."""
    _kept.add(thing)


def _close_all() -> None:
    for thing in list(_kept):
        with suppress(OSError):
            thing.close()


os.register_at_fork(after_in_child=_close_all)
