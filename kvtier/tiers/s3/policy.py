"""The smallest IAM policy that lets kvtier work in a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvtier.config import S3Config

OBJECT_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")
BUCKET_ACTIONS = ("s3:ListBucket",)
SETUP_ACTIONS = ("s3:GetLifecycleConfiguration", "s3:PutLifecycleConfiguration")
"""What only `kvtier bucket init` needs, for the rule for aborted uploads."""

_PARTITIONS = (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov"))


def iam_policy(config: S3Config) -> dict[str, Any]:
    """Return the policy document for the nodes that share a prefix of a bucket."""
    region = config.region or ""
    partition = next((name for start, name in _PARTITIONS if region.startswith(start)), "aws")
    if config.express:
        place = f"arn:{partition}:s3express:{region or '*'}:*:bucket/{config.bucket}"
        statements = [_allow("KvtierSessions", ["s3express:CreateSession"], place)]
    else:
        arn = f"arn:{partition}:s3:::{config.bucket}"
        below = f"{config.prefix}/*"
        listing = {"Condition": {"StringLike": {"s3:prefix": below}}}
        statements = [
            _allow("KvtierObjects", OBJECT_ACTIONS, f"{arn}/{below}"),
            {**_allow("KvtierListing", BUCKET_ACTIONS, arn), **listing},
        ]
    if config.kms_key is not None:
        statements.append(_allow("KvtierKey", ["kms:GenerateDataKey", "kms:Decrypt"], config.kms_key))
    return {"Version": "2012-10-17", "Statement": statements}


def _allow(name: str, actions: Sequence[str], resource: str) -> dict[str, Any]:
    return {"Sid": name, "Effect": "Allow", "Action": list(actions), "Resource": resource}
