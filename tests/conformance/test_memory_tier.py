"""The memory tier speaks the tier protocol."""

from __future__ import annotations

import random
from pathlib import Path

from kvtier.tiers import Tier
from kvtier.tiers.memory import MemoryTier

from .tier_suite import BoundedTierSuite

SLOT_BYTES = 5000


class TestMemoryTier(BoundedTierSuite):
    overfull = 600

    def make_tier(self, place: Path) -> Tier:
        return MemoryTier(256 * 8192, SLOT_BYTES)

    def payload(self, index: int) -> bytes:
        return random.Random(index).randbytes(SLOT_BYTES)
