"""The disk tier speaks the tier protocol."""

from __future__ import annotations

import random
from pathlib import Path

from kvtier.hashing import Namespace
from kvtier.tiers import Tier
from kvtier.tiers.disk import DiskTier

from .tier_suite import BoundedTierSuite, PersistentTierSuite

MAX_PAYLOAD_BYTES = 8192


class TestDiskTier(PersistentTierSuite, BoundedTierSuite):
    overfull = 600

    def make_tier(self, place: Path) -> Tier:
        return DiskTier(place, 2 << 20, Namespace.from_facts({"model": "suite"}), MAX_PAYLOAD_BYTES)

    def payload(self, index: int) -> bytes:
        source = random.Random(index)
        return source.randbytes(source.randint(1, MAX_PAYLOAD_BYTES))
