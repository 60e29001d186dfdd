"""Forked children that outlive their parent must not stand for it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

import pytest

from kvtier.agent.launch import launch
from kvtier.agent.place import take_lock
from tests.agent_support import PROCESSES, Place, eventually, store_of
from tests.store_support import chain, save

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@contextmanager
def forked_child() -> Iterator[None]:
    """A child that has all that this process has, and does nothing."""
    pid = os.fork()
    if not pid:
        signal.pause()
        os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def be_engine(place: Place, told: Connection) -> None:
    """Hold a lease, have a child, and wait to be killed."""
    client = place.connect()
    save(client, chain(2))
    assert client.match(chain(2)).lease
    pid = os.fork()
    if pid:
        told.send(pid)
    signal.pause()


def test_an_engine_whose_child_lives_on_is_dead_all_the_same(place, agent):
    told, theirs = PROCESSES.Pipe()
    engine = PROCESSES.Process(target=be_engine, args=(place, theirs))
    engine.start()
    child = told.recv()
    try:
        assert store_of(agent).stats()["leases"] == 1
        engine.kill()
        engine.join(30)
        eventually(lambda: store_of(agent).stats()["leases"] == 0, "what the engine held is free")
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_child_that_is_forked_while_an_agent_starts_does_not_keep_its_lock(place, monkeypatch):
    children = []

    def start(*command, **options):
        children.append(forked_child())
        children[0].__enter__()
        # The agent has ended again by now.
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", start)
    try:
        assert launch(place.config, place.directory)
        locks = []
        eventually(lambda: locks.append(take_lock(place.directory)) or locks[-1] is not None)
        os.close(locks[-1])
    finally:
        children[0].__exit__(None, None, None)
