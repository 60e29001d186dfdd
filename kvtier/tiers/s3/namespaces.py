"""The namespaces of a bucket, and the index of one of them for commands that look once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from kvtier._counters import Counters
from kvtier.errors import CorruptBlock
from kvtier.hashing import FORMAT_VERSION, Namespace
from kvtier.layout import MAX_BLOCK_BYTES
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.bucket import Bucket, ObjectMissing
from kvtier.tiers.s3.catalog import Catalog
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys

MAX_PAYLOAD_BYTES = MAX_BLOCK_BYTES + (1 << 20)
"""No encoded block of any layout is longer."""

_HEX = re.compile("[0-9a-f]{32}")
_MAX_DOCUMENT_BYTES = 1 << 20


def find_namespaces(bucket: Bucket, prefix: str) -> Iterator[str]:
    """Give the namespaces below a prefix, 32 hexadecimal digits each; a LIST request for each.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    root, after = f"{prefix}/", ""
    while (item := next(bucket.list(root, after), None)) is not None:
        name, slash, _ = item.key[len(root) :].partition("/")
        if slash and _HEX.fullmatch(name):
            yield name
        # "0" is what follows "/": behind everything in that folder.
        after = f"{root}{name}0" if slash else item.key


def read_facts(bucket: Bucket, keys: Keys, name: str) -> Mapping[str, Any]:
    """Read the facts behind a namespace's fingerprint.

    Args:
        bucket: The bucket.
        keys: The keys of the namespace.
        name: Its id as 32 hexadecimal digits.

    Raises:
        CorruptBlock: What is there are not the facts of that namespace, or those of another format version.
        ObjectMissing: There is nothing.
        TierError: The bucket does not answer or refuses.
    """
    data, _ = bucket.get_tail(keys.namespace, _MAX_DOCUMENT_BYTES)
    try:
        facts = json.loads(data)
        del facts["id"]
        namespace = Namespace.from_facts(facts)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptBlock(f"{keys.namespace} is not the document of a namespace") from error
    if namespace.hex != name:
        raise CorruptBlock(f"{keys.namespace} describes another namespace, or one of another version")
    return namespace.facts


def other_format(bucket: Bucket, keys: Keys) -> int | None:
    """Return the format of a namespace that another version of kvtier writes; None for one of this version's.

    What lies there looks damaged to this version, and is not.

    Raises:
        TierError: The bucket does not answer or refuses.
    """
    try:
        data, _ = bucket.get_tail(keys.namespace, _MAX_DOCUMENT_BYTES)
        facts = json.loads(data)
    except (ObjectMissing, ValueError, RecursionError):
        return None
    version = facts.get("format_version") if isinstance(facts, dict) else None
    return version if type(version) is int and version != FORMAT_VERSION else None


def open_catalog(bucket: Bucket, prefix: str, name: str, counters: Counters) -> tuple[Catalog, BlockIndex]:
    """Return the catalog of a namespace, and the index that it fills when it is told to.

    It follows nothing in the background. Close it.

    Args:
        bucket: The bucket.
        prefix: Of all keys.
        name: The namespace's id as 32 hexadecimal digits.
        counters: Gets what happened.
    """
    index = BlockIndex()
    catalog = Catalog(
        bucket,
        Keys(prefix, name),
        Namespace({}, bytes.fromhex(name)),
        index,
        Health("reading", Breaker(), counters),
        Health("writing", Breaker(), counters),
        counters,
        MAX_PAYLOAD_BYTES,
        refresh_seconds=1.0,
        on_ready=lambda: None,
    )
    return catalog, index
