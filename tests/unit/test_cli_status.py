"""`kvtier status`: what an agent says of itself, and what is said when none answers."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvtier import __version__
from kvtier.agent.place import HTTP
from kvtier.cli import app
from kvtier.cli.status import _rows, read_status
from kvtier.errors import ConfigError
from tests.agent_support import AgentProcess, Place, eventually, namespace_of
from tests.store_support import chain, save


@pytest.fixture
def place() -> Iterator[Place]:
    here = Place()
    yield here
    here.remove()


@pytest.fixture
def file(place: Place, tmp_path: Path) -> Path:
    """The configuration of `place`, written down."""
    written = tmp_path / "kvtier.yaml"
    written.write_text(f"memory: {{size: 1MiB}}\nagent: {{mode: external, directory: {place.directory}}}\n")
    return written


def status(file: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["status", "--config", str(file), *options])


def test_an_agent_that_runs(place: Place, file: Path) -> None:
    with AgentProcess(place):
        client = place.connect()
        save(client, chain(3))
        client.release(client.match(chain(4)).lease)
        report = read_status(place.config)
        shown = status(file)
        told = json.loads(status(file, "--json").stdout)
        client.close(1)
    assert (report["running"], report["ready"], report["agent"]["clients"]) == (True, True, 1)
    counted = report["namespaces"][namespace_of().hex]
    assert (counted["memory_blocks"], counted["hit_blocks_memory"], counted["missed_blocks"]) == (3, 3, 1)
    assert shown.exit_code == 0
    assert f"agent in {place.directory}: ready, 1 clients" in shown.stdout
    assert "found 3 of 4 blocks (75%); 3 saved" in shown.stdout
    assert told["namespaces"].keys() == {namespace_of().hex}


def test_an_agent_that_was_killed(place: Place, file: Path) -> None:
    agent = AgentProcess(place)
    eventually((place.directory / HTTP).exists)
    agent.kill()
    assert (place.directory / HTTP).exists()
    result = status(file)
    assert result.exit_code == 1
    assert result.stdout == f"no agent answers in {place.directory}; start it: kvtier agent\n"
    assert json.loads(status(file, "--json").stdout)["running"] is False


def test_no_agent_yet(file: Path) -> None:
    file.write_text(file.read_text().replace("external", "auto"))
    result = status(file)
    assert result.exit_code == 1
    assert "no agent answers" in result.stdout
    assert "the first engine starts one" in result.stdout


def test_no_agent_ever(file: Path) -> None:
    file.write_text(file.read_text().replace("external", "inprocess"))
    assert isinstance(status(file).exception, ConfigError)


@pytest.mark.parametrize(
    "body", [b"\xff\xfe", b"hello", b"<html>{</html>\n", b'kvtier_lookups{namespace="x"} 1\n', b"up 1\n"]
)
def test_something_else_listens_there(place: Place, body: bytes) -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (place.directory / HTTP).write_text(f"127.0.0.1:{server.server_address[1]}\n")
        assert read_status(place.config)["running"] is False
        server.shutdown()


@pytest.mark.parametrize("text", ["", "nonsense", "127.0.0.1:port", ":", "127.0.0.1:99999999", "\0:1"])
def test_an_address_that_is_none(place: Place, text: str) -> None:
    (place.directory / HTTP).write_text(text)
    assert read_status(place.config)["running"] is False


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        ({}, "ok"),
        ({"s3_ready": 0}, "index not loaded"),
        ({"s3_breaker_open": 1, "s3_write_breaker_open": 1}, "not read for now, not written for now"),
        ({"s3_quarantined_blocks": 2, "s3_pending_bytes": 2048}, "2 blocks damaged, 2KiB on their way"),
        ({"s3_errors_denied": 3, "s3_errors_timeout": 0}, "3 x denied"),
    ],
)
def test_troubles_of_the_bucket(figures: dict[str, float], says: str) -> None:
    (row,) = _rows({"s3_blocks_known": 7, "hit_blocks_s3": 5, **figures})
    assert row == ("s3", "7", "", "", "5", says)


def test_a_disk_that_is_not_written() -> None:
    figures = {"disk_blocks": 1, "disk_size_bytes": 1 << 20, "disk_writable": 0, "disk_errors_full": 1}
    assert _rows(figures)[0][-1] == "not written, 1 x full"


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"kvtier {__version__}\n"
