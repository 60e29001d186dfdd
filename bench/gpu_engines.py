"""Engines on a GPU with and without kvtier, and one request at a time: what `bench/gpu.py` measures with."""

from __future__ import annotations

import gc
import logging
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from overhead import timed

from kvtier.engine import Engine, EngineConfig, Model, Request, Tokenizer
from kvtier.trtllm import KvTierConnectorLeader, KvTierConnectorWorker

TOKENS_PER_BLOCK = 32
OUTPUT = 16
START_SECONDS = 60.0
"""In which an agent comes up and has its memory pinned."""


class _Said(logging.Handler):
    """Keeps the last warnings of kvtier, each of which is given at most once a minute."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: deque[str] = deque(maxlen=5)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


_said = _Said()
logging.getLogger("kvtier").addHandler(_said)


@dataclass
class Bench:
    """What all measurements share.

    Attributes:
        model: The model.
        device: Where it computes.
        directory: For configurations, sockets and the disk tier.
        longest: Tokens of the longest prompt.
        block_bytes: Of a block in the pool.
        kind: Form of the arena's slots, or "agent": raw ones in a process of its own.
        rng: Makes prompts.
    """

    model: Any
    device: str
    directory: Path
    longest: int
    block_bytes: int
    kind: str
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def prompt(self, length: int) -> list[int]:
        """Return a prompt that nobody has seen."""
        return [self.rng.randrange(self.model.spec.vocab_size) for _ in range(length)]

    def blocks(self, prompts: int) -> int:
        """Return how many blocks so many of the longest prompts take."""
        return prompts * (self.longest // TOKENS_PER_BLOCK + 2) + 8

    @contextmanager
    def engine(
        self, tiers: dict[str, Any] | None, model: Model | None = None, explain: bool = False, **llm_args: Any
    ) -> Iterator[Engine]:
        """Run an engine, with kvtier if tiers are given; at its end all is written.

        Args:
            tiers: Configuration of kvtier, but for what all engines have.
            model: None for the bench's.
            explain: Whether the connector's calls are timed.
            llm_args: Arguments that the connector sees.
        """
        config = EngineConfig(
            num_blocks=self.blocks(2), tokens_per_block=TOKENS_PER_BLOCK, version="1.3", poison=False,
            device=self.device,
        )  # fmt: skip
        connector: dict[str, Any] = {}
        if tiers is not None:
            file = self.directory / "kvtier.yaml"
            mode = "auto" if self.kind == "agent" else "inprocess"
            agent = {"mode": mode, "directory": str(self.directory / "agent"), "linger": "1s"}
            file.write_text(yaml.safe_dump({"flush_timeout": "5m", "agent": agent, **tiers}))
            os.environ["KVTIER_CONFIG"] = str(file)
            classes = KvTierConnectorLeader, KvTierConnectorWorker
            leader, worker = map(timed, classes) if explain else classes
            connector = {"leader_class": leader, "worker_class": worker, "llm_args": llm_args}
        engine = Engine(model or self.model, config, **connector)
        try:
            if tiers is not None:
                self._wait_until_saved(engine)
            yield engine
        finally:
            engine.close()
            if engine.connector is not None:
                engine.connector.worker.close()
                engine.connector.leader.close()
            del engine
            gc.collect()

    def _wait_until_saved(self, engine: Engine) -> None:
        """Ask until a block is saved: before the agent is there and its memory is pinned, none is.

        Raises:
            RuntimeError: That does not happen; with what kvtier has to say about it.
        """
        deadline = time.monotonic() + START_SECONDS
        while not saved(engine, 1, 0.0):
            assert engine.connector is not None
            stats = {**engine.connector.leader.stats(), **engine.connector.worker.stats()}
            is_open = any(name.startswith("store_") for name in stats)
            if not is_open or time.monotonic() > deadline:
                what = "nothing is saved" if is_open else "the store is not open"
                raise RuntimeError(f"{what}: {'; '.join(_said.lines) or stats}")
            ask(engine, self.prompt(TOKENS_PER_BLOCK + 1), 1)
            time.sleep(0.05)

    def memory(self, prompts: int) -> dict[str, Any]:
        """Return the configuration of an arena for so many of the longest prompts."""
        slots = "planes" if self.kind == "planes" else "raw"
        slot = self.block_bytes * (0.78 if slots == "planes" else 1) + 4096
        size = f"{int(self.blocks(prompts) * slot / 2**20) + 1}MiB"
        return {"memory": {"size": size, "format": slots}}


@dataclass
class Run:
    """One request: seconds to the first token, a token after that, and in all; tokens brought; the output."""

    ttft: float
    next: float
    total: float
    external: int
    output: list[int]


def ask(engine: Engine, prompt: Sequence[int], output: int = OUTPUT) -> Run:
    """Run a request alone."""
    started = time.perf_counter()
    request_id = engine.submit(Request(list(prompt), output))
    engine.settle(300)
    total = time.perf_counter() - started
    metrics = engine.metrics(request_id)
    assert metrics.ttft_s is not None
    after = (total - metrics.ttft_s) / max(1, output - 1)
    return Run(metrics.ttft_s, after, total, metrics.tokens_external, engine.output(request_id))


def count(engine: Engine) -> int:
    """Return how many blocks an engine has saved."""
    return int(engine.connector.worker.stats().get("saved_blocks", 0)) if engine.connector else 0


def saved(engine: Engine, blocks: int, timeout: float = 10.0) -> bool:
    """Say whether so many blocks are in the arena, before the time is up."""
    deadline = time.monotonic() + timeout
    while count(engine) < blocks:
        if time.monotonic() > deadline:
            return False
        engine.idle()
    return True


def wait_until_written(engine: Engine, timeout: float = 120.0) -> None:
    """Wait until all that was saved is in the lower tiers."""
    pending = ("store_encoding_blocks", "store_queued_bytes", "store_s3_pending_bytes")
    deadline = time.monotonic() + timeout
    while any(engine.connector.leader.stats().get(name) for name in pending):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not written after {timeout:g} s")
        time.sleep(0.01)


class Text(Bench):
    """Prompts are stretches of text."""

    tokens: list[int]

    def prompt(self, length: int) -> list[int]:  # noqa: D102
        start = self.rng.randrange(len(self.tokens))
        return [self.rng.randrange(1000), *(self.tokens * 9)[start : start + length - 1]]


def text_tokens(directory: Path | None) -> list[int]:
    """Return the documentation as tokens."""
    text = "\n".join(path.read_text() for path in sorted(Path(__file__).parent.parent.glob("docs/*.md")))
    return list(Tokenizer(directory).encode(text))
