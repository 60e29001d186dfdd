"""What the configuration has to know about this machine: its memory and its directories."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its container's where less."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        try:
            limit = min(limit, int(Path(path).read_text()))
        except (OSError, ValueError):
            # Absent outside containers and under the other cgroup version; "max" where there is no limit.
            continue
    return limit


def directory_problem(path: Path) -> str | None:
    """Say why `path` cannot serve as a writable directory, or return None.

    Nothing is created: the nearest parent that exists decides.
    """
    parent = _nearest_existing(path)
    if not parent.is_dir():
        return f"{parent} is not a directory"
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"{parent} is not writable for this user"
    return None


def filesystem_bytes(path: Path) -> int:
    """Return the total size in bytes of the file system that `path` is or would be on."""
    return shutil.disk_usage(_nearest_existing(path)).total


def _nearest_existing(path: Path) -> Path:
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    return path
