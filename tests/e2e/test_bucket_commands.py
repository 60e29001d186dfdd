"""The commands that look into a bucket, on a real server with real encoded blocks in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from kvtier._counters import Counters
from kvtier.cli import app
from kvtier.codec import BlockCodec, check_block
from kvtier.config import S3Config
from kvtier.errors import CorruptBlock
from kvtier.hashing import Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.tiers import StoredBlock
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.heat import HeatLog
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.open_bucket import open_bucket
from kvtier.tiers.s3.policy import iam_policy
from tests.faults import s3_proxy
from tests.faults.s3_proxy import FaultyProxy, Spoil
from tests.s3_support import BUCKET, S3Place, eventually, hashes_of, payloads_of, read_all

LAYOUT = BlockLayout("bfloat16", tokens_per_block=32, layers=2, kv_factor=2, row_elements=2048)
CODEC_SPACE = {"model": {"name": "tests/[tiny]"}, "layout": LAYOUT.describe()}
NAMESPACE = Namespace.from_facts(CODEC_SPACE)
CODEC = BlockCodec(LAYOUT, NAMESPACE.id)
BOUND = CODEC.max_encoded_bytes

Command = Callable[..., Result]


def encoded_chain(count: int, seed: int = 1) -> list[StoredBlock]:
    """Make a chain of blocks that are what they say."""
    rng = random.Random(seed)
    parent = chain_root(NAMESPACE.id)
    blocks: list[StoredBlock] = []
    tokens = [rng.randrange(50_000) for _ in range(count * 32)]
    for block_hash in hash_blocks(parent, tokens, 32):
        payload = bytes(CODEC.encode(block_hash, rng.randbytes(LAYOUT.block_bytes)))
        blocks.append(StoredBlock(block_hash, parent, len(blocks), payload))
        parent = block_hash
    return blocks


def open_tier(place: S3Place) -> S3Tier:
    tier = S3Tier(place.config(), NAMESPACE, LAYOUT, BOUND)
    # The first look for packs that no segment lists is over: it lists none by chance later on.
    eventually(lambda: tier.stats()["index_rebuilds"])
    return tier


def fill(place: S3Place, count: int = 70, seed: int = 1) -> list[StoredBlock]:
    tier = open_tier(place)
    blocks = encoded_chain(count, seed)
    assert tier.write(blocks) == count
    assert tier.flush(60)
    tier.close()
    return blocks


def keys(place: S3Place, kind: str) -> list[str]:
    start = f"{place.prefix}/{NAMESPACE.hex}/{kind}"
    found = place.client.list_objects_v2(Bucket=BUCKET, Prefix=start).get("Contents", [])
    return [item["Key"] for item in found]


@pytest.fixture
def run(s3_bucket: S3Place, tmp_path: Path) -> Command:
    """Run a command on the place, or on `endpoint` instead."""

    def call(*words: str, endpoint: str | None = None) -> Result:
        settings = {
            "bucket": BUCKET,
            "prefix": s3_bucket.prefix,
            "endpoint": endpoint or s3_bucket.server.endpoint,
            "region": "us-east-1",
            "access_key_env": s3_bucket.config().access_key_env,
            "secret_key_env": s3_bucket.config().secret_key_env,
        }
        file = tmp_path / "kvtier.yaml"
        file.write_text(yaml.safe_dump({"memory": {"size": "1MiB"}, "s3": settings}))
        return CliRunner().invoke(app, [*words, "--config", str(file)], env={"COLUMNS": "300"})

    return call


@pytest.fixture
def proxy(s3_bucket: S3Place) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_bucket.server.endpoint) as running:
        yield running


def report_of(result: Result) -> Any:
    assert result.exit_code in (0, 1), result.output
    return json.loads(result.stdout)


def spoil(place: S3Place, key: str, at: int) -> None:
    data = bytearray(place.get(key))
    data[at] ^= 1
    place.put(key, bytes(data))


def test_every_flipped_byte_of_a_block_is_noticed_without_decoding() -> None:
    [block] = encoded_chain(1)
    payload = bytearray(block.payload)
    check_block(payload, block.hash, NAMESPACE.id)
    for wrong in ((bytes(16), NAMESPACE.id), (block.hash, bytes(16))):
        with pytest.raises(CorruptBlock):
            check_block(payload, *wrong)
    with pytest.raises(CorruptBlock):
        check_block(payload[:-1], block.hash, NAMESPACE.id)
    for at in range(len(payload)):
        payload[at] ^= 1
        with pytest.raises(CorruptBlock):
            check_block(payload, block.hash, NAMESPACE.id)
        payload[at] ^= 1


def test_an_empty_bucket_is_in_order(run: Command) -> None:
    assert report_of(run("verify", "--json"))["namespaces"] == {}
    assert report_of(run("ls", "--json"))["namespaces"] == {}
    assert report_of(run("rebuild-index", "--json"))["namespaces"] == {}


def test_ls_counts_what_is_there(s3_bucket: S3Place, run: Command) -> None:
    blocks = fill(s3_bucket)
    s3_bucket.put(f"{s3_bucket.prefix}/notes.txt", b"not ours")
    s3_bucket.put(f"{s3_bucket.prefix}/{NAMESPACE.hex}/packs/xx/other", b"not ours")
    row = report_of(run("ls", "--json"))["namespaces"][NAMESPACE.hex]
    assert row["blocks"] == len(blocks)
    assert row["packs"] == len(keys(s3_bucket, "packs")) - 1
    assert row["bytes"] == sum(len(s3_bucket.get(key)) for key in keys(s3_bucket, "packs") if ".kvp" in key)
    assert row["unlisted"] == 0
    assert row["last_write"] > 1.6e9
    assert row["last_use"] is None
    heat = HeatLog()
    heat.note(blocks[0].hash)
    assert heat.write(
        open_bucket(s3_bucket.config(), Counters()), Keys(s3_bucket.prefix, NAMESPACE.hex), NAMESPACE.id
    )
    assert report_of(run("ls", "--json"))["namespaces"][NAMESPACE.hex]["last_use"] > 1.6e9
    text = run("ls").stdout
    assert "tests/[tiny] bfloat16 32 tokens" in text
    s3_bucket.delete(keys(s3_bucket, "index"))
    row = report_of(run("ls", "--json"))["namespaces"][NAMESPACE.hex]
    assert (row["blocks"], row["unlisted"], row["last_write"]) == (0, row["packs"], None)


def test_verify_finds_nothing_wrong_in_a_sound_bucket(s3_bucket: S3Place, run: Command) -> None:
    blocks = fill(s3_bucket)
    result = run("verify", "--json")
    assert result.exit_code == 0
    found = report_of(result)["namespaces"][NAMESPACE.hex]
    assert (found["blocks"], found["packs"]) == (len(blocks), len(keys(s3_bucket, "packs")))
    assert (found["damages"], found["unlisted"]) == ([], 0)


def test_verify_lists_what_is_damaged_and_repairs_it(s3_bucket: S3Place, run: Command) -> None:
    blocks = fill(s3_bucket)
    flipped, cut, *rest = keys(s3_bucket, "packs")
    assert rest
    spoil(s3_bucket, flipped, 16 + len(blocks[0].payload) // 2)
    s3_bucket.put(cut, s3_bucket.get(cut)[:-5])
    segments = keys(s3_bucket, "index")
    for segment in segments:
        spoil(s3_bucket, segment, 100)
    document = f"{s3_bucket.prefix}/{NAMESPACE.hex}/namespace.json"
    s3_bucket.put(document, b"{}")
    names = Keys(s3_bucket.prefix, NAMESPACE.hex)
    small = [names.new_tombstone(1), names.new_heat(1)]
    for key in small:
        s3_bucket.put(key, b"neither tombstone nor summary")

    result = run("verify", "--json")
    assert result.exit_code == 1
    damages = report_of(result)["namespaces"][NAMESPACE.hex]["damages"]
    assert {damage["key"] for damage in damages} == {flipped, cut, document, *segments, *small}
    [block] = [damage["block"] for damage in damages if damage["key"] == flipped]
    assert block in {block.hash.hex() for block in blocks}
    assert f"damaged: {flipped} block {block}: " in run("verify").stdout

    repaired = run("verify", "--repair", "--json")
    assert repaired.exit_code == 1
    assert report_of(repaired)["removed"] == 3 + len(segments) + len(small)
    assert report_of(repaired)["reindexed"] == len(rest)
    assert run("verify").exit_code == 0
    tier = open_tier(s3_bucket)
    assert tier.wait_ready(60)
    sound = {block.hash for block in blocks if tier.match([block.hash])}
    assert sound
    got = read_all(tier, sorted(sound))
    assert {payload for payload in got.values() if payload} <= set(payloads_of(blocks).values())
    assert None not in got.values()
    # What was removed is written again by whoever computes it.
    assert tier.write(blocks) == len(blocks)
    assert tier.flush(60)
    assert read_all(tier, hashes_of(blocks)) == payloads_of(blocks)
    tier.close()
    assert run("verify").exit_code == 0


def test_a_reply_that_is_none_is_no_reason_to_delete(
    s3_bucket: S3Place, run: Command, proxy: FaultyProxy
) -> None:
    fill(s3_bucket)
    before = keys(s3_bucket, "")
    proxy.choose = lambda method, path, headers: s3_proxy.html(200) if ".kvp" in path else None
    result = run("verify", "--repair", "--json", endpoint=proxy.endpoint)
    assert result.exit_code == 1
    assert len(report_of(result)["namespaces"][NAMESPACE.hex]["damages"]) == len(keys(s3_bucket, "packs"))
    assert report_of(result)["removed"] == 0
    assert keys(s3_bucket, "") == before


def test_rebuild_index_finds_packs_that_no_segment_lists(s3_bucket: S3Place, run: Command) -> None:
    blocks = fill(s3_bucket)
    packs = keys(s3_bucket, "packs")
    s3_bucket.delete(keys(s3_bucket, "index"))
    assert keys(s3_bucket, "index") == []
    found = report_of(run("verify", "--json"))["namespaces"][NAMESPACE.hex]
    assert (found["packs"], found["unlisted"], found["damages"]) == (len(packs), len(packs), [])
    rows = report_of(run("rebuild-index", "--json"))["namespaces"]
    assert rows == {NAMESPACE.hex: {"recovered": len(packs), "packs": len(packs), "blocks": len(blocks)}}
    assert len(keys(s3_bucket, "index")) == 1
    assert report_of(run("rebuild-index", "--json"))["namespaces"][NAMESPACE.hex]["recovered"] == 0


def test_bucket_init_on_a_server_where_everything_is_allowed(s3_bucket: S3Place, run: Command) -> None:
    other = {"ID": "mine", "Status": "Enabled", "Filter": {"Prefix": "logs/"}, "Expiration": {"Days": 7}}
    s3_bucket.client.put_bucket_lifecycle_configuration(
        Bucket=BUCKET, LifecycleConfiguration={"Rules": [other]}
    )
    result = run("bucket", "init", "--json")
    assert result.exit_code == 0, result.output
    report = report_of(result)
    assert [(check["name"], check["ok"]) for check in report["checks"]] == [
        ("s3:ListBucket", True),
        ("s3:PutObject", True),
        ("s3:GetObject", True),
        ("ranged GET", True),
        ("conditional PUT", True),
        ("s3:DeleteObject", True),
    ]
    assert report["aborted_uploads"]["ok"], report
    rules = s3_bucket.client.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    assert {rule["ID"] for rule in rules} == {"mine", f"kvtier-aborted-uploads-{s3_bucket.prefix}"}
    [kept] = [rule for rule in rules if rule["ID"] == "mine"]
    assert kept["Expiration"] == {"Days": 7}
    assert report["policy"] == iam_policy(s3_bucket.config(region="us-east-1"))
    probes = s3_bucket.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{s3_bucket.prefix}/")
    assert probes["KeyCount"] == 0
    text = run("bucket", "init").stdout
    assert "The bucket can be used." in text
    assert "was set already" in text


@pytest.mark.parametrize(
    ("method", "fault", "failed", "usable"),
    [
        ("DELETE", s3_proxy.error(403, "AccessDenied"), ["s3:DeleteObject"], True),
        ("GET", s3_proxy.error(403, "AccessDenied"), ["s3:ListBucket", "s3:GetObject", "ranged GET"], False),
        ("PUT", s3_proxy.error(403, "AccessDenied"), ["s3:PutObject"], False),
        ("PUT", s3_proxy.error(404, "NoSuchBucket"), ["s3:PutObject"], False),
        ("PUT", s3_proxy.error(507, "XMinioStorageFull"), ["s3:PutObject"], False),
    ],
)
def test_bucket_init_says_what_is_missing(
    run: Command, proxy: FaultyProxy, method: str, fault: Spoil, failed: list[str], usable: bool
) -> None:
    proxy.choose = lambda asked, path, headers: fault if asked == method else None
    result = run("bucket", "init", "--json", endpoint=proxy.endpoint)
    report = report_of(result)
    assert result.exit_code == (0 if usable else 1)
    assert report["usable"] is usable
    bad = {check["name"]: check["detail"] for check in report["checks"] if not check["ok"]}
    assert set(failed) <= set(bad)
    assert all(bad.values())
    assert "The bucket can" in run("bucket", "init", endpoint=proxy.endpoint).stdout


@pytest.mark.parametrize("refuses", [False, True])
def test_bucket_init_detects_a_server_without_conditional_put(
    s3_bucket: S3Place, run: Command, proxy: FaultyProxy, refuses: bool
) -> None:
    """Some servers ignore the header, others do not know it and say so."""

    def choose(method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if method == "PUT" and "If-None-Match" in headers:
            if refuses:
                return s3_proxy.error(501, "NotImplemented")
            # The header is signed: what makes the server overlook it is that there is no such object.
            s3_bucket.delete([path.removeprefix(f"/{BUCKET}/")])
        return None

    proxy.choose = choose
    result = run("bucket", "init", "--json", endpoint=proxy.endpoint)
    assert result.exit_code == 0, result.output
    [check] = [check for check in report_of(result)["checks"] if check["name"] == "conditional PUT"]
    assert not check["ok"]
    assert "not supported" in check["detail"]


def test_without_a_bucket_there_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kvtier.yaml"
    file.write_text("memory: {size: 1MiB}\n")
    for words in (["ls"], ["verify"], ["rebuild-index"], ["bucket", "init"]):
        result = CliRunner().invoke(app, [*words, "--config", str(file)])
        assert "no section s3" in str(result.exception)


def test_the_shipped_policy_is_the_one_that_is_printed() -> None:
    shipped = Path(__file__).parents[2] / "deploy" / "iam-policy.json"
    assert json.loads(shipped.read_text()) == iam_policy(S3Config(bucket="your-bucket"))

    def text(**settings: Any) -> str:
        return json.dumps(iam_policy(S3Config(**{"bucket": "abc", "prefix": "p", **settings})))

    assert "arn:aws-cn:s3:::abc/p/*" in text(region="cn-north-1")
    assert "arn:aws-us-gov:s3:::abc" in text(region="us-gov-west-1")
    assert "kms:" not in text(encryption="aws:kms")
    assert "kms:GenerateDataKey" in text(encryption="aws:kms", kms_key="arn:aws:kms:eu-west-1:1:key/2")
    express = text(bucket="abc--use1-az4--x-s3", express=True)
    assert "s3express:CreateSession" in express
    assert "s3:PutObject" not in express
