"""The servers of the compatibility tests: each started once for all tests that want it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.compat.rgw import rgw
from tests.compat.servers import BUCKET, Missing, Server, client_of, juicefs, rclone, seaweedfs

SERVERS = {"seaweedfs": seaweedfs, "juicefs": juicefs, "rclone": rclone, "rgw": rgw}


@pytest.fixture(scope="module", params=list(SERVERS))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with an empty bucket."""
    try:
        opened = SERVERS[request.param](tmp_path_factory.mktemp(request.param))
        running = opened.__enter__()
    except Missing as missing:
        pytest.skip(str(missing))
    try:
        client: Any = client_of(running)
        if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
            client.create_bucket(Bucket=BUCKET)
        yield running
    finally:
        opened.__exit__(None, None, None)
