"""The same tests on every server that runs here, through both clients: what differs stands in `Server`."""

from __future__ import annotations

import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kvtier._counters import Counters
from kvtier.cli import app
from kvtier.config import S3Config
from kvtier.errors import AccessDenied
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.bucket import Bucket, ObjectMissing
from kvtier.tiers.s3.compaction import Compactor
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.open_bucket import open_bucket
from tests.compat.servers import BUCKET, Server, client_of
from tests.e2e.test_bucket_commands import CODEC, LAYOUT, NAMESPACE, encoded_chain
from tests.s3_support import eventually, hashes_of, payloads_of, read_all

KEYS = ("KVTIER_COMPAT_ACCESS_KEY", "KVTIER_COMPAT_SECRET_KEY")
TRANSPORTS = ("http", "boto3")


@dataclass
class Place:
    """A prefix of its own on a server."""

    server: Server
    prefix: str

    def settings(self, **changes: Any) -> dict[str, Any]:
        return {
            "bucket": BUCKET,
            "prefix": self.prefix,
            "endpoint": self.server.endpoint,
            "region": "us-east-1",
            "access_key_env": KEYS[0],
            "secret_key_env": KEYS[1],
            **changes,
        }

    def config(self, **changes: Any) -> S3Config:
        return S3Config(**self.settings(index_refresh=0.1, concurrency=8, **changes))

    def tier(self, **changes: Any) -> S3Tier:
        tier = S3Tier(self.config(**changes), NAMESPACE, LAYOUT, CODEC.max_encoded_bytes)
        eventually(lambda: tier.stats()["index_rebuilds"])
        return tier

    def bucket(self, **changes: Any) -> Bucket:
        return open_bucket(self.config(**changes), Counters())

    def run(self, directory: Path, *words: str) -> tuple[int, Any]:
        """Run a command and return its exit code and report."""
        file = directory / "kvtier.yaml"
        file.write_text(yaml.safe_dump({"memory": {"size": "1MiB"}, "s3": self.settings()}))
        result = CliRunner().invoke(app, [*words, "--json", "--config", str(file)])
        assert result.exit_code in (0, 1), repr(result.exception)
        return result.exit_code, json.loads(result.stdout)

    def keys(self, kind: str) -> list[str]:
        client: Any = client_of(self.server)
        start = f"{self.prefix}/{NAMESPACE.hex}/{kind}"
        return [
            item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix=start).get("Contents", [])
        ]


@pytest.fixture
def place(server: Server, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv(KEYS[0], server.access_key)
    monkeypatch.setenv(KEYS[1], server.secret_key)
    return Place(server, f"t-{secrets.token_hex(6)}")


@pytest.fixture
def stored(place: Place) -> list[StoredBlock]:
    tier = place.tier()
    blocks = encoded_chain(70)
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(60)
    tier.close()
    return blocks


def test_bucket_init_knows_what_the_server_can_do(place: Place, tmp_path: Path) -> None:
    code, report = place.run(tmp_path, "bucket", "init")
    assert code == 0, report
    works = {check["name"]: check["ok"] for check in report["checks"]}
    assert works.pop("conditional PUT") is place.server.conditional, report
    assert all(works.values()), report
    assert report["aborted_uploads"]["ok"] is place.server.lifecycle, report


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_one_node_stores_and_another_loads(place: Place, transport: str) -> None:
    writer, reader = (place.tier(transport=transport) for _ in range(2))
    blocks = encoded_chain(70)
    assert writer.write(blocks) == len(blocks)
    assert writer.flush(60)
    eventually(lambda: reader.match(hashes_of(blocks)) == len(blocks))
    for tier in (writer, reader):
        assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
        stats = tier.stats()
        assert not [name for name in stats if name.startswith("errors_")], stats
        assert not stats["bad_replies"]
        tier.close()


def test_replicas_that_store_the_same_agree(place: Place) -> None:
    nodes = [place.tier() for _ in range(2)]
    blocks = encoded_chain(70)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda node: (node.write(blocks), node.flush(60)), nodes))
    fresh = place.tier()
    for node in (*nodes, fresh):
        assert read_all(node, hashes_of(blocks)) == payloads_of(blocks)
        node.close()


def test_a_pack_that_is_gone_is_forgotten(place: Place, stored: list[StoredBlock]) -> None:
    tier = place.tier()
    bucket = place.bucket()
    for key in place.keys("packs"):
        bucket.delete(key)
        bucket.delete(key)
    assert set(read_all(tier, hashes_of(stored)).values()) == {None}
    assert tier.match(hashes_of(stored)) == 0
    assert not tier.stats()["breaker_open"]
    tier.close()
    bucket.close()


def test_the_commands_work(place: Place, stored: list[StoredBlock], tmp_path: Path) -> None:
    code, report = place.run(tmp_path, "verify")
    assert code == 0, report
    assert report["namespaces"][NAMESPACE.hex]["blocks"] == len(stored)
    damaged = place.keys("packs")[0]
    client: Any = client_of(place.server)
    body = client.get_object(Bucket=BUCKET, Key=damaged)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=damaged, Body=body[:-1])
    code, report = place.run(tmp_path, "verify", "--repair")
    assert (code, report["removed"]) == (1, 1)
    for key in place.keys("index"):
        client.delete_object(Bucket=BUCKET, Key=key)
    code, report = place.run(tmp_path, "rebuild-index")
    assert report["namespaces"][NAMESPACE.hex]["recovered"] == len(place.keys("packs"))
    code, report = place.run(tmp_path, "ls")
    assert report["namespaces"][NAMESPACE.hex]["packs"] == len(place.keys("packs"))
    assert place.run(tmp_path, "verify")[0] == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_objects_come_back_as_they_went(place: Place, transport: str) -> None:
    bucket = place.bucket(transport=transport)
    body = secrets.token_bytes(300_000)
    for name in ("plain", "a b+c!*'()~-._", "deep/er/still"):
        key = f"{place.prefix}/odd/{name}"
        assert bucket.put(key, body)
        part = bytearray(100_000)
        bucket.get_range(key, 77_777, memoryview(part))
        assert part == body[77_777:177_777]
        assert bucket.get_tail(key, 1000) == (body[-1000:], len(body))
        assert bucket.get_tail(key, 1 << 20) == (body, len(body))
        with pytest.raises(ObjectMissing):
            bucket.get_range(key, len(body), memoryview(bytearray(10)))
    with pytest.raises(ObjectMissing):
        bucket.get_tail(f"{place.prefix}/odd/none", 10)
    with pytest.raises(ObjectMissing):
        bucket.get_range(f"{place.prefix}/none/at/all", 0, memoryview(bytearray(10)))
    bucket.close()


def test_listings_come_in_order_and_in_pages(place: Place) -> None:
    bucket = place.bucket()
    names = [f"{place.prefix}/many/{number:05d}" for number in range(1005)]
    # Two first objects at once in a new directory are one too many for rclone.
    bucket.put(names[0], b"x")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: bucket.put(key, b"x"), names[1:]))
    found = [item.key for item in bucket.list(f"{place.prefix}/many/")]
    assert found == names
    assert [item.key for item in bucket.list(f"{place.prefix}/many/", names[1000])] == names[1001:]
    assert [item.size for item in bucket.list(f"{place.prefix}/many/", names[-2])] == [1]
    assert list(bucket.list(f"{place.prefix}/other/")) == []
    bucket.close()


def test_small_segments_are_compacted(place: Place) -> None:
    """Lists, reads, writes and deletes as the background does."""
    tier = place.tier()
    blocks = encoded_chain(8)
    for block in blocks:
        tier.write([block])
        assert tier.flush(60)
    tier.close()
    bucket, counters = place.bucket(), Counters()
    keys = Keys(place.prefix, NAMESPACE.hex)
    data = b""
    for item in bucket.list(keys.index):
        buffer = bytearray(item.size)
        bucket.get_range(item.key, 0, memoryview(buffer))
        data = bytes(buffer)
    for time_ns in range(64):
        bucket.put(keys.new_segment(time_ns + 1), data)
    hour = 3600 * 1_000_000_000
    clock = [1_800_000_000 * 1_000_000_000]
    compactor = Compactor(
        bucket, keys, NAMESPACE.id, CODEC.max_encoded_bytes, counters, clock=lambda: clock[0]
    )
    compactor.run()
    clock[0] += 2 * hour
    compactor.run()
    counts = counters.snapshot()
    assert counts["index_segments_compacted"] == counts["index_segments_deleted"] >= 64
    fresh = place.tier()
    assert read_all(fresh, hashes_of(blocks)) == payloads_of(blocks)
    fresh.close()
    bucket.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_wrong_key_is_refused_with_advice(
    place: Place, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS[1], "something else")
    bucket = place.bucket(transport=transport)
    with pytest.raises(AccessDenied, match=r"secret key|credentials"):
        bucket.get_tail(f"{place.prefix}/x", 10)
    with pytest.raises(AccessDenied, match=r"secret key|credentials"):
        list(bucket.list(f"{place.prefix}/"))
    bucket.close()
