"""S3 Express directory buckets: where they are, and the sessions whose credentials sign their requests."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Any

from botocore.credentials import ReadOnlyCredentials

from kvtier.config.rules import express_zone

_SPARE_SECONDS = 60.0
"""Sessions last five minutes; a new one is made this long before."""


def express_host(bucket: str, region: str) -> str:
    """Return the host name of a directory bucket on AWS."""
    return f"{bucket}.s3express-{express_zone(bucket)}.{region}.amazonaws.com"


class Sessions:
    """A source of credentials as `KeyRing` wants it: those of the current session with a directory bucket."""

    def __init__(self, create: Callable[[], Mapping[str, Any]]):
        """Prepare; `create` makes a session and returns its credentials as CreateSession does."""
        self._create = create
        self._credentials: ReadOnlyCredentials | None = None
        self._end = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)

    def refresh_needed(self, seconds: float | None = None) -> bool:
        """Say whether the session ends within so many seconds; None for the usual reserve."""
        left = self._end - datetime.datetime.now(datetime.timezone.utc)
        return left.total_seconds() < (_SPARE_SECONDS if seconds is None else seconds)

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return credentials that are good for a minute at least; may make a session. Not thread-safe.

        Raises:
            TierError: No session can be made.
        """
        if self._credentials is None or self.refresh_needed():
            made = self._create()
            self._credentials = ReadOnlyCredentials(
                made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"]
            )
            self._end = made["Expiration"]
        return self._credentials
