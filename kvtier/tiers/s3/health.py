"""How a bucket is doing: every request's outcome goes to a breaker, the statistics and the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.errors import AccessDenied, CorruptBlock, TierFull
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.bucket import BadReply, BucketThrottled, ObjectMissing, cause_of

_logger = logging.getLogger(__name__)


class Health:
    """The breaker of one direction, reading or writing, and what happens to failures on the way.

    Attributes:
        breaker: Says whether requests should be made at all.
    """

    def __init__(self, what: str, breaker: Breaker, counters: Counters):
        """Watch requests of one direction.

        Args:
            what: "reading" or "writing", for the log.
            breaker: Gets every outcome.
            counters: Gets `errors_<cause>` for every failure.
        """
        self.breaker = breaker
        self._what = what
        self._counters = counters

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Report how the requests made inside went; exceptions pass through."""
        try:
            yield
        except Exception as error:
            self._report(error)
            raise
        else:
            self.breaker.success()

    def _report(self, error: Exception) -> None:
        cause = cause_of(error)
        self._counters.add(f"errors_{cause}")
        if isinstance(error, BadReply):
            self._counters.add("bad_replies")
        if isinstance(error, ObjectMissing) or (
            isinstance(error, CorruptBlock) and not isinstance(error, BadReply)
        ):
            # The bucket answers; it is the object that is gone or bad.
            self.breaker.success()
        else:
            self.breaker.failure(
                denied=isinstance(error, AccessDenied | TierFull),
                pause=error.retry_after if isinstance(error, BucketThrottled) else None,
            )
        log_once(_logger, f"{self._what}:{cause}", "S3 tier, %s (%s): %s", self._what, cause, error)
