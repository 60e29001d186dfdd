"""The S3 tier: blocks in packs in a bucket that a whole cluster shares, found through index segments."""

from kvtier.tiers.s3.tier import S3Tier

__all__ = ["S3Tier"]
