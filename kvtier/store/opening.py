"""The lower tiers that a configuration declares."""

from __future__ import annotations

import logging

from kvtier._logging import log_once
from kvtier.codec import BlockCodec
from kvtier.config import Config
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.tiers import Tier

_log = logging.getLogger(__name__)


def open_tiers(config: Config, namespace: Namespace, layout: BlockLayout) -> list[Tier]:
    """Open the lower tiers that `config` declares, fastest first; no bucket for a private namespace.

    Nobody else could ever read what would lie there. The disk extends the memory of the engine itself, and
    what is left of it there ages out.

    Raises:
        ConfigError: The disk tier is too small for a block, or a credential variable is unset.
    """
    bound = BlockCodec(layout, namespace.id).max_encoded_bytes
    tiers: list[Tier] = []
    # Imported here: a store without a bucket need not pay for the S3 client's import.
    if config.disk:
        from kvtier.tiers.disk import DiskTier

        tiers.append(DiskTier(config.disk.path, config.disk.size, namespace, bound))
    if config.s3 and namespace.is_private:
        log_once(
            _log,
            "private",
            "namespace %s is private to one engine, whose log says why: nothing of it goes to the bucket",
            namespace.hex,
        )
    elif config.s3:
        from kvtier.tiers.s3 import S3Tier

        bucket = S3Tier(config.s3, namespace, layout, bound)
        if tiers and config.s3.warm_on_start:
            bucket.warm(tiers[0], config.s3.warm_on_start)
        tiers.append(bucket)
    return tiers
