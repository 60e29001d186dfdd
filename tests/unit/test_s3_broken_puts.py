"""What is left of PUTs that broke off: it must not keep anybody from storing the blocks."""

from __future__ import annotations

from collections.abc import Callable

from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.bucket import RangeMissing
from kvtier.tiers.s3.pack import write_pack
from tests.s3_support import NAMESPACE, WINDOW, FakeBucket, chain, hashes_of, payloads_of, read_all
from tests.s3_tier_support import bucket, open_tier, stored

__all__ = ["bucket", "open_tier"]


def test_an_object_without_bytes_under_a_packs_name_is_no_obstacle(
    bucket: FakeBucket, open_tier: Callable[..., S3Tier]
) -> None:
    """Some servers keep what there was of a PUT that broke off, and have no last bytes of nothing."""
    tier, blocks = open_tier(), chain(WINDOW)
    _, pack = write_pack(blocks, NAMESPACE.id)
    key = f"kvtier/{NAMESPACE.hex}/packs/{pack.name.hex()[:2]}/{pack.name.hex()}.kvp"
    bucket.objects[key] = b""

    def before(kind: str, asked: str) -> None:
        if (kind, asked) == ("get", key):
            raise RangeMissing("416")

    bucket.before = before
    stored(tier, blocks)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    assert len(bucket.keys("packs/")) == 2
