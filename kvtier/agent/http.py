"""Health and metrics of an agent over HTTP."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric, UnknownMetricFamily
from prometheus_client.registry import Collector

from kvtier.agent.server import Agent

_log = logging.getLogger(__name__)

STALE_SECONDS = 5.0
"""An agent whose loop has not come round for so long is not alive."""

MAX_REQUESTS = 16
"""Connections at a time; those beyond are closed at once."""

_REQUEST_SECONDS = 5.0


class _AgentCollector(Collector):
    """Turns what the agent and its stores count into metrics, when they are asked for."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        """Yield `kvtier_agent_*`, and `kvtier_*` labelled with the namespace of each store."""
        for name, value in self._agent.stats().items():
            yield UnknownMetricFamily(f"kvtier_agent_{name}", f"Agent: {name}.", value)
        families: dict[str, UnknownMetricFamily] = {}
        for opened in self._agent.stores.open_stores():
            for name, value in opened.store.stats().items():
                if name not in families:
                    families[name] = UnknownMetricFamily(
                        f"kvtier_{name}", f"Store: {name}.", labels=["namespace"]
                    )
                families[name].add_metric([opened.store.namespace.hex], value)
        yield from families.values()


class _Handler(BaseHTTPRequestHandler):
    timeout = _REQUEST_SECONDS
    server: _Server

    def do_GET(self) -> None:
        """Answer /metrics, /healthz and /readyz."""
        agent = self.server.agent
        alive = time.monotonic() - agent.beat < STALE_SECONDS
        if self.path == "/metrics":
            self._send(200, CONTENT_TYPE_LATEST, generate_latest(self.server.registry))
        elif self.path == "/healthz":
            self._send(200 if alive else 503, "text/plain", b"alive\n" if alive else b"the loop hangs\n")
        elif self.path == "/readyz":
            ready = alive and not agent.stopping
            self._send(200 if ready else 503, "text/plain", b"ready\n" if ready else b"not ready\n")
        else:
            self._send(404, "text/plain", b"there are /metrics, /healthz and /readyz\n")

    def log_message(self, format: str, *args: object) -> None:
        """Keep requests out of the log."""

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], agent: Agent) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.agent = agent
        self.registry = CollectorRegistry()
        self.registry.register(_AgentCollector(agent))
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Have a request answered by a thread, if not too many are: anybody on this machine may connect."""
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            # There is no thread that would: the process may have no more of them.
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()


class HealthServer:
    """Serves an agent's metrics and health from a thread of its own.

    Attributes:
        address: "HOST:PORT" where it listens.
    """

    def __init__(self, agent: Agent, address: str | None) -> None:
        """Listen on `address`, or on a free port of loopback.

        Raises:
            OSError: The address cannot be bound.
        """
        host, _, port = (address or "127.0.0.1:0").rpartition(":")
        self._server = _Server((host.strip("[]"), int(port)), agent)
        self.address = f"{host}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="kvtier-http", daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
