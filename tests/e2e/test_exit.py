"""The engine never says goodbye: what it saved must reach disk and bucket when its process just ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kvtier.config import Config, DiskConfig, MemoryConfig
from kvtier.store import TieredStore
from tests.s3_support import eventually
from tests.store_support import LAYOUT, chain, content, make_store, read

BLOCKS = 40

ENGINE = """
import sys
from tests.store_support import LAYOUT, chain, make_store, save
import torch
from kvtier.config import load_config
from kvtier.connector.shared import share_store

shared = share_store(load_config(sys.argv[1]), make_store().namespace, LAYOUT, torch.device("cpu"))
assert save(shared.store, chain(40)) == 40
"""


@pytest.mark.parametrize("tier", ["disk", "s3"])
def test_a_process_that_ends_without_closing_has_written_what_it_saved(tmp_path, s3_bucket, tier):
    s3 = s3_bucket.config()
    sections = {
        "disk": f"disk: {{path: {tmp_path}/disk, size: 64MiB}}\n",
        "s3": f"s3: {{bucket: {s3.bucket}, prefix: {s3.prefix}, endpoint: '{s3.endpoint}', "
        f"access_key_env: {s3.access_key_env}, secret_key_env: {s3.secret_key_env}}}\n",
    }
    config = tmp_path / "kvtier.yaml"
    config.write_text("memory: {size: 8MiB}\nflush_timeout: 30s\n" + sections[tier])
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, str(config)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    node = TieredStore.open(
        Config(
            memory=MemoryConfig(size=8 << 20),
            disk=DiskConfig(path=tmp_path / "disk", size=64 << 20) if tier == "disk" else None,
            s3=s3 if tier == "s3" else None,
        ),
        make_store().namespace,
        LAYOUT,
    )
    if tier == "s3":
        eventually(lambda: node.stats()["s3_blocks_known"])
    hashes = chain(BLOCKS)
    match = node.match(hashes, wait=30)
    assert dict(match.sources) == {tier: BLOCKS}
    assert read(node, match.slots) == [content(block) for block in hashes]
    node.close(10)
