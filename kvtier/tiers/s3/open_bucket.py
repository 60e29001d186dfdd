"""Choosing the client that moves data."""

from __future__ import annotations

import urllib.request
from urllib.parse import urlsplit

from kvtier._counters import Counters
from kvtier.config import S3Config
from kvtier.tiers.s3.boto_bucket import BotoBucket
from kvtier.tiers.s3.bucket import Bucket
from kvtier.tiers.s3.http_bucket import HttpBucket


def open_bucket(config: S3Config, counters: Counters) -> Bucket:
    """Return a bucket by `config.transport`; does no I/O.

    Where a proxy stands in between, boto3 moves the data whatever the configuration says: our client knows
    none.
    """
    if config.transport == "boto3" or _is_proxied(config.endpoint):
        return BotoBucket(config, counters)
    return HttpBucket(config, counters)


def _is_proxied(endpoint: str | None) -> bool:
    parts = urlsplit(endpoint or "https://s3.amazonaws.com")
    proxies = urllib.request.getproxies()
    return parts.scheme in proxies and not urllib.request.proxy_bypass(parts.hostname or "")
