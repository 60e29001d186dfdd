"""The S3 tier speaks the tier protocol."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from kvtier.tiers import Tier
from tests.s3_support import S3Place

from .tier_suite import PersistentTierSuite


class TestS3Tier(PersistentTierSuite):
    @pytest.fixture(autouse=True)
    def _bucket(self, s3_bucket: S3Place) -> None:
        self.bucket = s3_bucket

    def make_tier(self, place: Path) -> Tier:
        return replace(self.bucket, prefix=f"{self.bucket.prefix}/{place.name}").tier()

    def payload(self, index: int) -> bytes:
        source = random.Random(index)
        return source.randbytes(source.randint(1, 20_000))
