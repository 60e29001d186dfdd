"""Seeded schedules: the whole connector over a bucket behind a proxy that fails in every way that it knows.

The hash model's next token depends on every byte of KV that it reads, so equal outputs mean equal bytes.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvtier.engine import Engine, EngineConfig, HashModel, Request
from kvtier.tiers.s3 import S3Tier
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker
from tests.faults import s3_proxy
from tests.faults.s3_proxy import FaultyProxy, Spoil
from tests.s3_support import SCRATCH_KEYS, S3Place
from tests.trtllm_support import write_config

SCHEDULES = int(os.environ.get("KVTIER_S3_SCHEDULES", 5))
FAULTS: tuple[Spoil, ...] = (
    s3_proxy.delayed,
    s3_proxy.trickling,
    s3_proxy.reset,
    s3_proxy.broken_off,
    s3_proxy.stalled,
    s3_proxy.hung,
    s3_proxy.error(503, "SlowDown"),
    s3_proxy.error(500, "InternalError"),
    s3_proxy.error(403, "AccessDenied"),
    s3_proxy.html(200),
    s3_proxy.shortened,
    s3_proxy.lengthened,
    s3_proxy.shifted,
    s3_proxy.range_ignored,
    s3_proxy.flipped,
)
RANGED = (s3_proxy.shifted, s3_proxy.range_ignored)
LONGEST_CALL = 2.0
"""Below a bucket's time-out here (3 s), and far above what a call waits by itself (50 ms)."""


class Weather:
    """Phases of some requests each: fair, or with one kind of fault for a part of the requests."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(f"weather {seed}")
        self._left = 0
        self._fault: Spoil | None = None
        self._share = 0.0
        self.fair = False
        self.spoilt: dict[str, int] = {}

    def __call__(self, method: str, path: str, headers: dict[str, str]) -> Spoil | None:
        if self._left == 0:
            self._left = self._rng.randrange(1, 12)
            self._fault = self._rng.choice((None, *FAULTS))
            self._share = self._rng.choice((0.3, 1.0))
        self._left -= 1
        fault = self._fault
        if self.fair or fault is None or self._rng.random() > self._share:
            return None
        if fault in RANGED and "Range" not in headers:
            return None
        self.spoilt[fault.__name__] = self.spoilt.get(fault.__name__, 0) + 1
        return fault if fault not in RANGED else _ranged(fault)


def _ranged(fault: Spoil) -> Spoil:
    """Spoil the replies that are parts; an error has no range to be spoilt."""
    return lambda reply: fault(reply) if "Content-Range" in reply.headers else reply


class Timed:
    """Notes the longest call that an engine makes to its connector."""

    def __init__(self, engine: Engine) -> None:
        self.longest = (0.0, "")
        for side in (engine.connector.leader, engine.connector.worker):
            for name in dir(side):
                call = getattr(side, name)
                if not name.startswith("_") and name not in ("close", "stats") and callable(call):
                    setattr(side, name, self._timed(name, call))

    def _timed(self, name: str, call: Any) -> Any:
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.monotonic()
            try:
                return call(*arguments, **named)
            finally:
                self.longest = max(self.longest, (time.monotonic() - start, name))

        return timed


@pytest.fixture
def proxy(s3_bucket: S3Place) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3_bucket.server.endpoint) as running:
        yield running


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3_bucket: S3Place, proxy: FaultyProxy) -> None:
    """A store of memory and the bucket behind the proxy, that probes and uploads without long pauses."""
    file = write_config(tmp_path)
    with file.open("a") as lines:
        lines.write(
            f"s3:\n  bucket: {s3_bucket.config().bucket}\n  prefix: {s3_bucket.prefix}\n"
            f"  endpoint: {proxy.endpoint}\n  region: us-east-1\n  index_refresh: 100ms\n  concurrency: 8\n"
            f"  access_key_env: {SCRATCH_KEYS[0]}\n  secret_key_env: {SCRATCH_KEYS[1]}\n"
            "  connect_timeout: 1s\n  read_timeout: 3s\nflush_timeout: 3s\n"
        )
    monkeypatch.setenv("KVTIER_CONFIG", str(file))
    defaults = S3Tier.__init__.__kwdefaults__
    monkeypatch.setitem(defaults, "longest_pause", 0.3)
    monkeypatch.setitem(defaults, "pack_delay", 0.2)


class Node:
    """An engine of its own, that knows nothing but the bucket; closes its store at the end."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(
            HashModel(layers=3, head_dim=64),
            config,
            leader_class=KvTierConnectorLeader,
            worker_class=KvTierConnectorWorker,
            # A commit names the model's weights; without one its KV is private, and stays out of the bucket.
            llm_args={"revision": "0" * 40},
        )
        self.timed = Timed(self.engine)

    def run(self, requests: list[Request], rng: random.Random) -> tuple[list[list[int]], int]:
        """Serve requests that come at random moments; return outputs and tokens that were loaded."""
        ids = []
        for request in requests:
            ids.append(self.engine.submit(request))
            for _ in range(rng.randrange(3)):
                self.engine.step()
        self.engine.settle()
        self.engine.idle(2)
        outputs = [self.engine.output(number) for number in ids]
        return outputs, sum(self.engine.metrics(number).tokens_external for number in ids)

    def stats(self) -> dict[str, float]:
        return self.engine.connector.leader.stats()

    def close(self) -> None:
        self.engine.connector.worker.close()
        self.engine.connector.leader.close()
        gc.collect()


def prompts(rng: random.Random) -> list[Request]:
    documents = [[rng.randrange(1000) for _ in range(100)] for _ in range(2)]
    return [
        Request([*rng.choice(documents)[: rng.randrange(30, 100)], rng.randrange(1000)], rng.randrange(1, 12))
        for _ in range(6)
    ]


@pytest.mark.parametrize("seed", range(SCHEDULES))
def test_outputs_are_the_same_whatever_the_bucket_does(proxy: FaultyProxy, seed: int) -> None:
    rng = random.Random(f"schedule {seed}")
    config = EngineConfig(
        num_blocks=rng.choice([30, 200]),
        tokens_per_block=8,
        max_tokens_per_step=rng.choice([None, 16]),
        overlap=rng.random() < 0.5,
        version=rng.choice(["1.1", "1.2", "1.3", "main"]),
    )
    wanted = prompts(rng)
    plain = Engine(HashModel(layers=3, head_dim=64), config)
    ids = [plain.submit(request) for request in wanted]
    plain.settle()
    expected = [plain.output(number) for number in ids]

    # What the others are to find.
    first = Node(config)
    assert first.run(wanted, rng)[0] == expected
    first.close()
    weather = Weather(seed)
    proxy.choose = weather
    # One that ends in bad weather, and one that sees it through.
    ended, node = Node(config), Node(config)
    for each in (ended, node):
        for _ in range(2):
            assert each.run(wanted, rng)[0] == expected
        stats = each.stats()
        assert not [name for name in stats if name.startswith("errors_")], stats
        if each is ended:
            each.close()
    # A node that is quick makes few requests, and these may all have met fair weather.
    deadline = time.monotonic() + 60
    while not weather.spoilt:
        assert time.monotonic() < deadline
        assert node.run(wanted, rng)[0] == expected
        time.sleep(0.05)
    longest = max(each.timed.longest for each in (first, ended, node))
    assert longest[0] < LONGEST_CALL, (longest, weather.spoilt)

    # Fair again: the same process finds its way back, and a new one loads.
    weather.fair = True
    deadline = time.monotonic() + 120
    while node.stats()["store_s3_breaker_open"] or not node.stats()["store_s3_ready"]:
        assert time.monotonic() < deadline, (node.stats(), weather.spoilt)
        time.sleep(0.05)
    assert node.run(wanted, rng)[0] == expected
    node.close()
    while True:
        fresh = Node(config)
        # An engine as quick as this one has computed everything before the index is there.
        while not fresh.stats().get("store_s3_ready"):
            assert time.monotonic() < deadline, (fresh.stats(), weather.spoilt)
            time.sleep(0.01)
        outputs, loaded = fresh.run(wanted, rng)
        again, more = fresh.run(wanted, rng)
        fresh.close()
        assert outputs == again == expected
        if loaded + more:
            break
        assert time.monotonic() < deadline, weather.spoilt
    print(f"longest call {longest}, spoilt {weather.spoilt}")
