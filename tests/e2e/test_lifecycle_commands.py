"""`kvtier gc` and `kvtier warm` on a real S3 server, as a user runs them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from kvtier.cli import app
from kvtier.cli.warm import read_prompts
from kvtier.codec import BlockCodec
from kvtier.config import load_config
from kvtier.connector.weights import adapter_digest
from kvtier.errors import ConfigError
from kvtier.hashing import FORMAT_VERSION, Namespace, chain_root, hash_blocks
from kvtier.layout import BlockLayout
from kvtier.store import open_tiers
from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.s3 import S3Tier
from tests.s3_support import S3Place, eventually, hashes_of, payloads_of, read_all

LAYOUT = BlockLayout("bfloat16", tokens_per_block=8, layers=2, kv_factor=2, row_elements=512)
SPACE = Namespace.from_facts({"model": "m", "layout": LAYOUT.describe()})
CODEC = BlockCodec(LAYOUT, SPACE.id)
WHOLE = 128
"""Blocks of a whole pack: 1,024 tokens."""


def prompt(count: int, seed: int) -> list[int]:
    return [(seed * 1009 + place) % 30_000 for place in range(count * LAYOUT.tokens_per_block)]


def encoded(count: int, seed: int, salt: str | None = None, lora: str | None = None) -> list[StoredBlock]:
    parent, blocks = chain_root(SPACE.id, salt, lora), []
    for name in hash_blocks(parent, prompt(count, seed), LAYOUT.tokens_per_block):
        payload = bytes(CODEC.encode(name, name * (LAYOUT.block_bytes // len(name))))
        blocks.append(StoredBlock(name, parent, len(blocks), payload))
        parent = name
    return blocks


@pytest.fixture
def file(s3_bucket: S3Place, tmp_path: Path) -> Path:
    keep = ("bucket", "prefix", "endpoint", "access_key_env", "secret_key_env")
    settings = {key: getattr(s3_bucket.config(), key) for key in keep}
    document = {
        "memory": {"size": "4MiB"},
        "disk": {"path": str(tmp_path / "disk"), "size": "64MiB"},
        "s3": {**settings, "index_refresh": "100ms"},
    }
    path = tmp_path / "kvtier.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def tier(s3_bucket: S3Place) -> Iterator[S3Tier]:
    with closing(S3Tier(s3_bucket.config(), SPACE, LAYOUT, CODEC.max_encoded_bytes)) as opened:
        eventually(lambda: opened.stats()["index_rebuilds"])
        yield opened


def store(tier: S3Tier, *chains: Sequence[StoredBlock]) -> None:
    for blocks in chains:
        tier.write(blocks)
        assert tier.flush(60)


def disk(file: Path) -> DiskTier:
    settings = load_config(file).disk
    assert settings is not None
    return DiskTier(settings.path, settings.size, SPACE, CODEC.max_encoded_bytes)


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["rebuild-index"], ["warm", "--top", "1GiB"]])
def test_an_empty_bucket_is_said_to_be_empty(s3_bucket: S3Place, file: Path, command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--config", str(file)])
    says = f"nothing below {s3_bucket.prefix}/ in {s3_bucket.config().bucket}"
    if command[0] == "warm":
        assert isinstance(result.exception, ConfigError)
        assert says in str(result.exception)
    else:
        assert (result.exit_code, result.stdout) == (0, f"{says}\n")


@pytest.mark.parametrize("command", [["verify", "--repair"], ["rebuild-index"]])
def test_what_another_version_writes_is_left_alone(
    s3_bucket: S3Place, tier: S3Tier, file: Path, command: list[str]
) -> None:
    """To this version it all looks damaged; repaired, a node that is behind would empty the others' cache."""
    store(tier, encoded(5, 1))
    name = "ab" * 16
    keys = [f"{s3_bucket.prefix}/{name}/{key}" for key in ("namespace.json", f"packs/cd/{'cd' * 16}.kvp")]
    document = json.dumps({"id": name, "model": "m", "format_version": FORMAT_VERSION + 1})
    bucket = s3_bucket.config().bucket
    for key, body in zip(keys, (document, "another format"), strict=True):
        s3_bucket.client.put_object(Bucket=bucket, Key=key, Body=body.encode())
    result = CliRunner().invoke(app, [*command, "--config", str(file)])
    assert result.exit_code == 0, result.output
    assert f"{name}: left alone, another version of kvtier writes it (format {FORMAT_VERSION + 1})" in (
        result.stdout
    )
    assert SPACE.hex in result.stdout
    assert name not in run(*command, "--config", str(file))["namespaces"]
    for key in keys:
        s3_bucket.client.head_object(Bucket=bucket, Key=key)


def test_gc_says_what_would_go_and_only_then_does_it(s3_bucket: S3Place, tier: S3Tier, file: Path) -> None:
    old, young = encoded(5, 1), encoded(5, 2)
    store(tier, old, young)
    keys = [*s3_bucket.keys(""), *tier._bucket.list(f"{s3_bucket.prefix}/")]
    nothing = run("gc", "--config", str(file), "--dry-run")
    assert (nothing["entries"], nothing["done"], nothing["packs"]) == ([], None, 2)
    time.sleep(2.1)
    planned = run("gc", "--config", str(file), "--dry-run", "--ttl", "1s")
    assert {entry["reason"] for entry in planned["entries"]} == {"ttl"}
    assert sum(entry["bytes"] for entry in planned["entries"]) == planned["bytes"]
    assert len([*s3_bucket.keys(""), *tier._bucket.list(f"{s3_bucket.prefix}/")]) == len(keys)
    shown = CliRunner().invoke(app, ["gc", "--config", str(file), "--dry-run", "--quota", "1KiB"])
    assert "quota: 2 packs" in shown.stdout
    assert "Nothing was changed" in shown.stdout

    first = run("gc", "--config", str(file), "--ttl", "1s")
    assert (first["done"]["condemned"], first["done"]["deleted"]) == (2, 0)
    assert len(s3_bucket_packs(s3_bucket)) == 2
    second = run("gc", "--config", str(file), "--ttl", "1s", "--grace", "0s")
    assert second["done"]["deleted"] == 2
    assert s3_bucket_packs(s3_bucket) == []


def s3_bucket_packs(place: S3Place) -> list[str]:
    start = f"{place.prefix}/{SPACE.hex}/packs/"
    pages = place.client.get_paginator("list_objects_v2").paginate(Bucket=place.config().bucket, Prefix=start)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


@pytest.mark.parametrize("arguments", [["--ttl", "1"], ["--quota", "x"], ["--grace", "soon"]])
def test_gc_refuses_nonsense(file: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["gc", "--config", str(file), *arguments])
    assert isinstance(result.exception, ConfigError)


def test_warm_brings_the_hottest_first_and_goes_on_where_it_stopped(tier: S3Tier, file: Path) -> None:
    cold, hot = encoded(WHOLE + 4, 1), encoded(WHOLE + 4, 2)
    store(tier, hot, cold)
    tier.note_use(hot[-1].hash)
    tier._upkeep.write_heat()
    size = sum(len(block.payload) for block in hot)
    with closing(disk(file)) as running:
        warmed = run("warm", "--config", str(file), "--top", str(size + 20_000), "--rate", "1GiB")
        assert (warmed["blocks"], warmed["held"], warmed["failed"]) == (len(hot), 0, 0)
        # A tier that has the directory open already finds them too.
        eventually(lambda: running.match(hashes_of(hot)) == len(hot))
    with closing(disk(file)) as opened:
        assert opened.match(hashes_of(hot)) == len(hot)
        assert opened.match(hashes_of(cold)) == 0
        assert read_all(opened, hashes_of(hot)) == payloads_of(hot)
        opened.discard(hashes_of(hot)[10:20])
    again = run("warm", "--config", str(file), "--top", "1GiB")
    assert again["blocks"] == 10 + len(cold)
    assert again["held"] == len(hot) - 10


def test_warm_with_prompts(tier: S3Tier, file: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{number}": number for number in range(2000)}
    model = tokenizers.models.WordLevel({**words, "[UNK]": 2000}, unk_token="[UNK]")
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    built.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    plain, salted, other = encoded(9, 1), encoded(6, 1, "s"), encoded(9, 3)
    adapted = encoded(5, 1, lora=adapter_digest(str(adapter)))
    store(tier, plain, salted, other, adapted)
    lines = [
        " ".join(f"w{token}" for token in prompt(7, 1)),
        {"tokens": prompt(9, 1), "cache_salt": "s"},
        {"tokens": prompt(9, 1), "lora": str(adapter)},
        {"tokens": [1, 2, 3]},
    ]
    file_of_prompts = tmp_path / "prompts.jsonl"
    file_of_prompts.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    options = ["--config", str(file), "--prompts", str(file_of_prompts)]
    warmed = run("warm", *options, "--tokenizer", str(folder))
    assert warmed["failed"] == 0
    with closing(disk(file)) as opened:
        assert opened.match(hashes_of(plain)) == 7
        assert opened.match(hashes_of(salted)) == 6
        assert opened.match(hashes_of(adapted)) == 5
        assert opened.match(hashes_of(other)) == 0
    result = CliRunner().invoke(app, ["warm", *options])
    assert "--tokenizer" in str(result.exception)
    file_of_prompts.write_text(json.dumps({"tokens": prompt(9, 1), "lora": str(tmp_path / "nowhere")}))
    result = CliRunner().invoke(app, ["warm", *options])
    assert "nowhere cannot be read" in str(result.exception)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "3",
        "[1]",
        "{}",
        '{"tokens": [1], "lora": 1}',
        '{"prompt": "a", "tokens": [1]}',
        '{"tokens": ["a"]}',
        '{"tokens": [-1]}',
    ],
)
def test_prompts_that_are_none(tmp_path: Path, line: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"tokens": [1]}}\n{line}\n')
    with pytest.raises(ConfigError, match=r"p\.jsonl:2"):
        list(read_prompts(file, lambda value: []))


def test_a_store_warms_its_disk_at_the_start(tier: S3Tier, file: Path) -> None:
    blocks = encoded(WHOLE, 4)
    store(tier, blocks)
    document = yaml.safe_load(file.read_text())
    document["s3"]["warm_on_start"] = "1GiB"
    file.write_text(yaml.safe_dump(document))
    config = load_config(file)
    opened, bucket = open_tiers(config, SPACE, LAYOUT)
    eventually(lambda: opened.match(hashes_of(blocks)) == len(blocks))
    eventually(lambda: bucket.stats().get("warmed_blocks") == len(blocks))
    assert read_all(opened, hashes_of(blocks)) == payloads_of(blocks)
    bucket.close()
    opened.close()
