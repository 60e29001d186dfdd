"""What the tests of the S3 tier share: chains of blocks, and a view of the bucket beside the tier's."""

from __future__ import annotations

import builtins
import functools
import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from botocore.config import Config

from kvtier.cli.s3server import S3Server
from kvtier.config import S3Config
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.tiers import StoredBlock, Tier
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.bucket import ListedObject, ObjectMissing
from kvtier.tiers.s3.pack import window_blocks

BUCKET = "kvtier-tests"
SCRATCH_KEYS = ("KVTIER_TEST_ACCESS_KEY", "KVTIER_TEST_SECRET_KEY")

NAMESPACE = Namespace.from_facts({"model": "test", "dtype": "bfloat16"})
LAYOUT = BlockLayout("bfloat16", tokens_per_block=32, layers=28, kv_factor=2, row_elements=3 * 64 * 32)
"""A small model's: 672 KiB a block."""
WINDOW = window_blocks(LAYOUT)
MAX_BYTES = LAYOUT.block_bytes + 4096


def chain(
    count: int, size: int = 20_000, seed: int = 1, prefix: Sequence[StoredBlock] = ()
) -> list[StoredBlock]:
    """Make a chain of `count` blocks with payloads of about `size` random bytes; it begins with `prefix`."""
    rng = random.Random(seed)
    blocks = list(prefix)
    parent = blocks[-1].hash if blocks else chain_root(NAMESPACE.id)
    tokens = [rng.randrange(50_000) for _ in range((count - len(blocks)) * LAYOUT.tokens_per_block)]
    for block_hash in hash_blocks(parent, tokens, LAYOUT.tokens_per_block):
        payload = rng.randbytes(rng.randint(max(1, size * 9 // 10), size))
        blocks.append(StoredBlock(block_hash, parent, len(blocks), payload))
        parent = block_hash
    return blocks


def hashes_of(blocks: Sequence[StoredBlock]) -> list[bytes]:
    return [block.hash for block in blocks]


def payloads_of(blocks: Sequence[StoredBlock]) -> dict[bytes, bytes]:
    return {block.hash: bytes(block.payload) for block in blocks}


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait for something that must come true; how long it takes is not the test's business."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def read_all(tier: Tier, hashes: Sequence[bytes]) -> dict[bytes, bytes | None]:
    """Read blocks and check that each was delivered exactly once."""
    got: dict[bytes, bytes | None] = {}
    times: dict[bytes, int] = {}
    lock = threading.Lock()

    def deliver(block_hash: bytes, payload: Any) -> None:
        with lock:
            times[block_hash] = times.get(block_hash, 0) + 1
            got[block_hash] = None if payload is None else bytes(payload)

    tier.read(hashes, deliver)
    assert times == dict.fromkeys(hashes, 1)
    return got


def assert_nothing_wrong(got: dict[bytes, bytes | None], blocks: Sequence[StoredBlock]) -> None:
    """Each block came with exactly its bytes, or not at all."""
    truth = payloads_of(blocks)
    for block_hash, payload in got.items():
        assert payload is None or payload == truth[block_hash]


class FakeBucket:
    """A bucket in memory whose requests a test can watch and make fail.

    Attributes:
        objects: What it holds.
        requests: Every request so far: kind and key.
        before: Called with kind and key before each request; may raise or wait.
        conditional: Whether a PUT leaves an object alone that is there already.
        modified: When each object was written, by the server's clock.
        clock: The server's clock, in seconds.
    """

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda kind, key: None
        self.conditional = True
        self.modified: dict[str, float] = {}
        self.clock: Callable[[], float] = time.time
        self._lock = threading.Lock()

    def get_range(self, key: str, offset: int, into: memoryview) -> None:
        self.get_parts(key, offset, len(into), iter([into]))

    def get_parts(self, key: str, offset: int, length: int, parts: Iterator[memoryview]) -> None:
        data = self._object("get", key)
        if offset + length > len(data):
            raise ObjectMissing(key)
        for part in parts:
            part[:] = data[offset : offset + len(part)]
            offset += len(part)

    def get_tail(self, key: str, length: int) -> tuple[bytes, int]:
        data = self._object("get", key)
        return data[-length:], len(data)

    def put(self, key: str, body: bytes) -> bool:
        self._note("put", key)
        with self._lock:
            if self.conditional and key in self.objects:
                return False
            self.objects[key] = body
            self.modified[key] = self.clock()
            return True

    def list(self, prefix: str, start_after: str = "") -> Iterator[ListedObject]:
        self._note("list", prefix)
        with self._lock:
            found = {key: len(body) for key, body in self.objects.items() if key.startswith(prefix)}
        times = dict(self.modified)
        return iter(
            ListedObject(key, found[key], times.get(key, 0.0)) for key in sorted(found) if key > start_after
        )

    def delete(self, key: str) -> None:
        self._note("delete", key)
        with self._lock:
            self.objects.pop(key, None)

    def server_time(self) -> float:
        return self.clock()

    def close(self) -> None:
        pass

    def count(self, kind: str, part: str = "") -> int:
        return sum(1 for done, key in list(self.requests) if done == kind and part in key)

    def keys(self, part: str) -> builtins.list[str]:
        with self._lock:
            return sorted(key for key in self.objects if f"/{part}" in key)

    def _object(self, kind: str, key: str) -> bytes:
        self._note(kind, key)
        with self._lock:
            if key not in self.objects:
                raise ObjectMissing(key)
            return self.objects[key]

    def _note(self, kind: str, key: str) -> None:
        self.requests.append((kind, key))
        self.before(kind, key)


@dataclass
class S3Place:
    """A prefix of the test bucket, seen from beside the tier.

    Attributes:
        server: The server.
        prefix: The prefix that `config` uses.
    """

    server: S3Server
    prefix: str

    def config(self, **changes: Any) -> S3Config:
        settings: dict[str, Any] = {
            "bucket": BUCKET,
            "prefix": self.prefix,
            "endpoint": self.server.endpoint,
            "access_key_env": SCRATCH_KEYS[0],
            "secret_key_env": SCRATCH_KEYS[1],
            "index_refresh": 0.1,
            "concurrency": 8,
        }
        return S3Config(**{**settings, **changes})

    def tier(self, *, ready: bool = True, config: S3Config | None = None, **options: Any) -> S3Tier:
        """Open a tier on this place: a node of its own, that knows nothing.

        Unless `ready` is false, it has loaded the index and looked for packs that no segment lists.
        """
        tier = S3Tier(config or self.config(), NAMESPACE, LAYOUT, MAX_BYTES, **options)
        if ready:
            eventually(lambda: tier.stats()["index_rebuilds"])
        return tier

    @property
    def client(self) -> Any:
        return _client(self.server.endpoint, self.server.access_key, self.server.secret_key)

    def keys(self, kind: str) -> list[str]:
        """List the keys of one kind: "packs", "index" or "namespace"."""
        start = f"{self.prefix}/{NAMESPACE.hex}/{kind}"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=start)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def get(self, key: str) -> bytes:
        return bytes(self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=body)

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.client.delete_object(Bucket=BUCKET, Key=key)


@functools.cache
def _client(endpoint: str, access_key: str, secret_key: str) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        config=Config(s3={"addressing_style": "path"}),
    )


def place_on(server: S3Server, patch: pytest.MonkeyPatch) -> S3Place:
    """Make a place of its own on a server, and set the variables that its configuration names."""
    patch.setenv(SCRATCH_KEYS[0], server.access_key)
    patch.setenv(SCRATCH_KEYS[1], server.secret_key)
    return S3Place(server, prefix=f"t-{secrets.token_hex(6)}")
