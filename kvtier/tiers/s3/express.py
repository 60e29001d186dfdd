"""S3 Express directory buckets: where they are, and the sessions whose credentials sign their requests."""

from __future__ import annotations

import datetime
import threading
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
    """The credentials of the current session with a directory bucket. Thread-safe."""

    def __init__(self, create: Callable[[], Mapping[str, Any]]):
        """Prepare; `create` makes a session and returns its credentials as CreateSession does."""
        self._create = create
        self._lock = threading.Lock()
        self._credentials: ReadOnlyCredentials | None = None
        self._end = datetime.datetime.min.replace(tzinfo=datetime.timezone.utc)

    def credentials(self) -> ReadOnlyCredentials:
        """Return credentials that are good for a minute at least.

        Raises:
            TierError: No session can be made.
        """
        with self._lock:
            now = datetime.datetime.now(datetime.timezone.utc)
            if self._credentials is None or (self._end - now).total_seconds() < _SPARE_SECONDS:
                made = self._create()
                self._credentials = ReadOnlyCredentials(
                    made["AccessKeyId"], made["SecretAccessKey"], made["SessionToken"]
                )
                self._end = made["Expiration"]
            return self._credentials

    def forget(self) -> None:
        """Make a new session for the next request."""
        with self._lock:
            self._credentials = None
