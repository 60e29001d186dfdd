"""What went wrong on the disk, by cause, and whether writing to it makes sense at present."""

from __future__ import annotations

import errno
import logging
import sqlite3
import threading
import time

from diskcache import Timeout

from kvtier._logging import log_once
from kvtier.errors import CorruptBlock

_logger = logging.getLogger(__name__)

CAUSES = ("busy", "full", "read_only", "io", "corrupt")
"""busy: another process held the database too long; io: anything that is none of the others."""

_ERRNO_CAUSES = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EFBIG: "full",
    errno.EROFS: "read_only",
    errno.EACCES: "read_only",
    errno.EPERM: "read_only",
}
_SQLITE_CAUSES = {
    "locked": "busy",
    "full": "full",
    "readonly": "read_only",
    "permission": "read_only",
    "disk I/O error": "io",
    "unable to open": "io",
    "out of memory": "io",
    "interrupted": "io",
    "protocol": "io",
    "transaction": "io",
    "closed database": "io",
}
"""Parts of the messages of SQLite errors that say nothing against the database itself."""


def cause_of(error: BaseException) -> str:
    """Return which of `CAUSES` an error of diskcache, SQLite or the file system comes down to."""
    while isinstance(error, Timeout):
        # diskcache says Timeout whatever kept a transaction from beginning; SQLite's own word is its context.
        error = error.__context__ or sqlite3.OperationalError("database is locked")
    if isinstance(error, sqlite3.Error) and "no transaction is active" in str(error) and error.__context__:
        # diskcache rolled back what SQLite itself had rolled back; why is the context.
        error = error.__context__
    if isinstance(error, (sqlite3.OperationalError, sqlite3.ProgrammingError)):
        return next((cause for text, cause in _SQLITE_CAUSES.items() if text in str(error)), "corrupt")
    if isinstance(error, OSError):
        return _ERRNO_CAUSES.get(error.errno or 0, "io")
    # TypeError and ValueError are what diskcache makes of a database with the right tables and absurd values.
    absurd = (CorruptBlock, sqlite3.Error, sqlite3.Warning, TypeError, ValueError)
    return "corrupt" if isinstance(error, absurd) else "io"


class Health:
    """What the shards of one tier counted, and whether writing makes sense at present."""

    def __init__(self, retry_seconds: float) -> None:
        self.retry_seconds = retry_seconds
        self._lock = threading.Lock()
        names = ("hits", "misses", "writes", "evictions", "orphans_removed", "shards_reset", "oversized")
        self._counts = dict.fromkeys((*names, *(f"errors_{cause}" for cause in CAUSES)), 0)
        self._writable = True
        self._resume_at = 0.0

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += number

    def counts(self) -> dict[str, int]:
        """Return all counters."""
        with self._lock:
            return dict(self._counts)

    def failed(self, error: BaseException) -> str:
        """Count and log an error by its cause, and return the cause."""
        cause = cause_of(error)
        self.count(f"errors_{cause}")
        log_once(_logger, cause, "the disk tier misses because of %r (%s)", error, cause)
        return cause

    @property
    def writable(self) -> bool:
        """Whether the last write succeeded, so far as the disk is concerned."""
        return self._writable

    @property
    def paused(self) -> bool:
        """Whether a write failed too recently to try the next one."""
        return not self._writable and time.monotonic() < self._resume_at

    def wrote(self, cause: str | None) -> None:
        """Note how a write went: None for well, else why not; a busy or repaired shard tells nothing."""
        if cause is None:
            self._writable = True
        elif cause not in ("busy", "corrupt"):
            self._resume_at = time.monotonic() + self.retry_seconds
            self._writable = False
