"""The smallest IAM policy that lets kvtier work in a bucket."""

from __future__ import annotations

from typing import Any

OBJECT_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject")
BUCKET_ACTIONS = ("s3:ListBucket",)
SETUP_ACTIONS = ("s3:GetLifecycleConfiguration", "s3:PutLifecycleConfiguration")
"""What only `kvtier bucket init` needs, for the rule for aborted uploads."""

_PARTITIONS = (("cn-", "aws-cn"), ("us-gov-", "aws-us-gov"))


def iam_policy(
    bucket: str, prefix: str, region: str | None = None, kms_key: str | None = None
) -> dict[str, Any]:
    """Return the policy document for the nodes of one prefix of one bucket.

    Args:
        bucket: Name of the bucket.
        prefix: What every key begins with.
        region: Tells AWS's partitions apart (China, GovCloud); None for the usual one.
        kms_key: ARN of the KMS key that objects are encrypted with, None without one.
    """
    partition = next((name for start, name in _PARTITIONS if (region or "").startswith(start)), "aws")
    arn = f"arn:{partition}:s3:::{bucket}"
    statements: list[dict[str, Any]] = [
        {
            "Sid": "KvtierObjects",
            "Effect": "Allow",
            "Action": list(OBJECT_ACTIONS),
            "Resource": f"{arn}/{prefix}/*",
        },
        {
            "Sid": "KvtierListing",
            "Effect": "Allow",
            "Action": list(BUCKET_ACTIONS),
            "Resource": arn,
            "Condition": {"StringLike": {"s3:prefix": f"{prefix}/*"}},
        },
    ]
    if kms_key is not None:
        statements.append(
            {
                "Sid": "KvtierKey",
                "Effect": "Allow",
                "Action": ["kms:GenerateDataKey", "kms:Decrypt"],
                "Resource": kms_key,
            }
        )
    return {"Version": "2012-10-17", "Statement": statements}
