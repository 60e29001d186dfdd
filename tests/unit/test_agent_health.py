"""Health and metrics of an agent over HTTP."""

from __future__ import annotations

import http.client as http_client
import socket
import urllib.error
import urllib.request

import pytest

from kvtier.agent import http
from kvtier.agent.http import HealthServer
from tests.agent_support import eventually, namespace_of
from tests.store_support import chain, save


class TestHealth:
    @pytest.fixture
    def get(self, agent):
        server = HealthServer(agent.agent, None)

        def get(path):
            try:
                with urllib.request.urlopen(f"http://{server.address}{path}", timeout=30) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        yield get
        server.close()

    def test_metrics_are_told_by_namespace(self, place, agent, get):
        client = place.connect()
        save(client, chain(3))
        client.match(chain(3))
        status, text = get("/metrics")
        assert status == 200
        lines = text.splitlines()
        assert f'kvtier_saved_blocks{{namespace="{namespace_of().hex}"}} 3.0' in lines
        assert f'kvtier_memory_slots{{namespace="{namespace_of().hex}"}} 16.0' in lines
        assert "kvtier_agent_clients 1.0" in lines
        assert "kvtier_agent_stores 1.0" in lines
        client.close(1)

    def test_health(self, agent, get, monkeypatch):
        assert get("/healthz") == (200, "alive\n")
        assert get("/readyz") == (200, "ready\n")
        assert get("/")[0] == 404
        monkeypatch.setattr(http, "STALE_SECONDS", -1.0)
        assert get("/healthz")[0] == 503
        assert get("/readyz")[0] == 503

    def test_connections_that_say_nothing_are_bounded(self, agent, monkeypatch):
        monkeypatch.setattr(http, "MAX_REQUESTS", 3)
        server = HealthServer(agent.agent, None)
        host, port = server.address.split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(3)]

        def answered():
            try:
                with urllib.request.urlopen(f"http://{server.address}/healthz", timeout=30) as answer:
                    return answer.status == 200
            except (OSError, http_client.HTTPException):
                return False

        eventually(lambda: not answered(), "there are too many")
        for one in silent:
            one.close()
        eventually(answered, "there is room again")
        server.close()

    def test_requests_that_get_no_thread_leave_their_places_to_others(self, agent, get, monkeypatch):
        def fail(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as without:
            without.setattr(http.threading.Thread, "start", fail)
            for _ in range(http.MAX_REQUESTS + 1):
                with pytest.raises((OSError, http_client.HTTPException)):
                    get("/healthz")
        assert get("/healthz") == (200, "alive\n")

    def test_an_agent_that_ends_is_alive_and_not_ready(self, agent, get):
        agent.agent._stopping = True
        assert get("/readyz")[0] == 503
