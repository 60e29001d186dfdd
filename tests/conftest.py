"""Fixtures that several kinds of tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from kvtier.cli.s3server import S3Server
from tests.s3_support import BUCKET, S3Place, place_on

# How long an example takes is not the test's business: the machine may be busy.
settings.register_profile("kvtier", deadline=None)
settings.load_profile("kvtier")


@pytest.fixture(autouse=True)
def told_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test see messages that are told once a minute."""
    monkeypatch.setattr("kvtier._logging._last", {})


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server on loopback. Tests that kill or pause it bring it back before they end."""
    with S3Server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    """A place of its own in the server's bucket, with the configuration that points at it."""
    return place_on(s3_server, monkeypatch)
