"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from kvtier.cli.s3server import S3Server
from tests.s3_support import BUCKET, SCRATCH_KEYS, S3Place


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server on loopback. Tests that kill or pause it bring it back before they end."""
    with S3Server() as server:
        server.create_bucket(BUCKET)
        yield server


@pytest.fixture
def s3_bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    """A place of its own in the server's bucket, with the configuration that points at it."""
    monkeypatch.setenv(SCRATCH_KEYS[0], s3_server.access_key)
    monkeypatch.setenv(SCRATCH_KEYS[1], s3_server.secret_key)
    return S3Place(s3_server, prefix=f"t-{secrets.token_hex(6)}")
