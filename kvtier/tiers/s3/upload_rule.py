"""The bucket's rule that clears away uploads in parts that nobody finished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from kvtier.tiers.s3.boto_bucket import translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

RULE_ID = "kvtier-aborted-uploads"
DAYS = 1
_MAX_ID = 255


def ensure_upload_rule(client: S3Client, bucket: str, prefix: str) -> bool:
    """See to it that unfinished multipart uploads below `prefix` are cleared away after a day.

    kvtier makes none; tools that copy packs do, and what they leave is paid for and never listed. All other
    rules of the bucket stay as they are.

    Args:
        client: For the bucket's server.
        bucket: Name of the bucket.
        prefix: Of all keys.

    Returns:
        Whether the rule had to be written.

    Raises:
        TierError: The server refuses, does not know such rules, or did not keep them.
    """
    rules, options = _read(client, bucket)
    wanted: Any = {
        "ID": f"{RULE_ID}-{prefix}"[:_MAX_ID],
        "Status": "Enabled",
        "Filter": {"Prefix": f"{prefix}/"},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": DAYS},
    }
    if wanted in rules:
        return False
    others = [rule for rule in rules if rule.get("ID") != wanted["ID"]]
    with translated("setting lifecycle rules"):
        client.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": [*others, wanted]}, **options
        )
    return True


def _read(client: S3Client, bucket: str) -> tuple[list[Any], dict[str, Any]]:
    """Return the bucket's rules, and what else has to be said again when they are written."""
    with translated("reading lifecycle rules"):
        try:
            reply = client.get_bucket_lifecycle_configuration(Bucket=bucket)
        except ClientError as error:
            if error.response["Error"].get("Code") != "NoSuchLifecycleConfiguration":
                raise
            return [], {}
    size = reply.get("TransitionDefaultMinimumObjectSize")
    return list(reply.get("Rules", [])), {"TransitionDefaultMinimumObjectSize": size} if size else {}
