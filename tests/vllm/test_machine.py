"""vLLM's scheduler, kvtier and a model of a model: storms at thousands of steps, and failures one by one."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm has an environment with it")

from vllm.v1.request import RequestStatus

from kvtier.hashing import chain_root, hash_blocks
from kvtier.vllm.meta import WorkerMeta
from kvtier.vllm.request import RequestState
from tests.s3_support import eventually
from tests.vllm.engine import SEED
from tests.vllm.machine import BLOCK, Machine, next_token

# 64 slots: what is stored falls out again, or to the disk and back.
MEMORY = "memory: {size: 1MiB}\nagent: {mode: inprocess}\n"
DISK = MEMORY + "disk: {path: PLACE/disk, size: 64MiB}\nlookup_wait: 1s\n"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Any]:
    made: list[Machine] = []

    def make(tiers: str = MEMORY, **options: Any) -> Machine:
        made.append(Machine(tmp_path, tiers.replace("PLACE", str(tmp_path)), **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def text(seed: object, tokens: int, prefix: list[int] | None = None) -> list[int]:
    rng = random.Random(f"{SEED} {seed}")
    return [*(prefix or []), *(rng.randrange(1000) for _ in range(tokens))]


def told(machine: Machine, name: str) -> bool:
    """Say whether a request has said what it has to say."""
    request = machine.requests[name]
    prompt = list(request.prompt_token_ids)
    return machine.said[name] == [next_token(prompt, n) for n in range(request.max_tokens)]


def nothing_held(machine: Machine) -> None:
    eventually(lambda: machine.store.stats()["leases"] == machine.store.stats()["filling_slots"] == 0, 20)


def count(machine: Machine, name: str) -> float:
    return machine.scheduler.connector.scheduler.take_counts().get(name, 0)


def lose(machine: Machine, how: Any) -> None:
    """Let loads fail whenever `how()` says so."""
    copy_in = machine.worker.worker._copy_in

    def maybe(transfers: Any, store: Any, load: Any) -> None:
        if how():
            raise RuntimeError("lost")
        copy_in(transfers, store, load)

    machine.worker.worker._copy_in = maybe


def lose_elsewhere(machine: Machine, how: Any) -> None:
    """Let loads fail whenever `how()` says so, but on another rank than this one, which saves for all.

    What it computes of these requests is wrong all the same, since each rank has a part of every layer.
    """
    half = machine.scheduler.connector.scheduler
    half.engine = dataclasses.replace(half.engine, latent=True, ranks=2)
    half._one_saves = True
    worker, failed = machine.worker, [0]
    copy_in, meta = worker.worker._copy_in, worker.build_connector_worker_meta

    def maybe(transfers: Any, store: Any, load: Any) -> None:
        if how():
            store.release(load.lease, 0)
            worker.worker._failed_pages.update(load.pages)
            failed[0] = worker.worker._step
        else:
            copy_in(transfers, store, load)

    worker.worker._copy_in = maybe
    worker.build_connector_worker_meta = lambda: meta().aggregate(WorkerMeta(0, failed[0]))


KINDS = {
    "plain": {},
    "second runner": {"second_runner": True},
    "asynchronous": {"asynchronous": True},
    "drafts": {"drafts": True},
    "disk": {"tiers": DISK},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("losses", [0.0, 0.2], ids=["", "lost loads"])
def test_storm(kind, losses, machine):
    storm(kind, losses, machine, lose)


@pytest.mark.parametrize("kind", ["plain", "second runner", "asynchronous", "drafts"])
def test_storm_with_loads_that_are_lost_on_another_rank_than_the_one_that_saves(kind, machine):
    storm(kind, 0.2, machine, lose_elsewhere)


def storm(kind: str, losses: float, machine: Any, losing: Any) -> None:
    print("seed", SEED)
    rng = random.Random(f"{SEED} {kind} {losses}")
    # Prompts are computed in pieces that end inside of a block, and the pool holds two or three requests.
    engine = machine(pages=33, budget=23, seed=rng.random(), **KINDS[kind])
    losing(engine, lambda: rng.random() < losses)
    families = [text(f"{kind} family {n}", rng.randrange(6, 40)) for n in range(3)]
    alive: list[str] = []
    for n in range(100):
        prefix = rng.choice(families)
        if alive and rng.random() < 0.5:
            # A conversation goes on, or begins again somewhere.
            former = rng.choice(alive[-10:])
            prefix = [*engine.requests[former].prompt_token_ids, *engine.said[former]][:70]
            prefix = prefix[: rng.choice([len(prefix), rng.randrange(2, len(prefix))])]
        engine.add(f"r{n}", text(f"{kind} {n}", rng.randrange(1, 12), prefix), rng.randrange(1, 40))
        alive.append(f"r{n}")
        for _ in range(rng.choice([0, 0, 1, 8, 20])):
            engine.step()
        if rng.random() < 0.3:
            gone = alive.pop(rng.randrange(len(alive)))
            if gone in engine.scheduler.requests:
                engine.cancel(gone)
        if rng.random() < 0.1:
            engine.scheduler.reset_prefix_cache()
    engine.run_out()
    assert all(told(engine, name) for name in alive)
    assert count(engine, "loaded_tokens") > 0
    assert (count(engine, "failed_steps") > 0) == (losses > 0)
    assert engine.preempted() > 10
    nothing_held(engine)


def test_a_promise_that_gets_no_pages_is_given_back(machine):
    engine = machine(pages=12)
    engine.add("first", text("shared", 5 * BLOCK), 1)
    engine.run_out()
    engine.scheduler.reset_prefix_cache()
    engine.add("long", text("long", 5 * BLOCK), 12)
    engine.step()
    # Its blocks are found each time that it is thought of; there is no room as long as the other runs.
    engine.add("second", [*text("shared", 5 * BLOCK), 1, 2], 1)
    engine.step()
    assert engine.requests["second"].status == RequestStatus.WAITING
    assert engine.store.stats()["leases"] <= 1
    engine.cancel("second")
    engine.step()
    assert engine.store.stats()["leases"] == 0
    engine.run_out()
    assert told(engine, "long")


def test_a_lost_load_is_computed_and_nothing_of_the_step_is_stored(machine):
    engine = machine(pages=64)
    prompt = text("lost", 6 * BLOCK + 1)
    engine.add("first", prompt, 1)
    engine.run_out()
    engine.scheduler.reset_prefix_cache()
    losses = [True]
    lose(engine, lambda: losses.pop() if losses else False)
    longer = [*prompt, *text("more", 4 * BLOCK)]
    engine.add("second", longer, 3)
    engine.step()
    assert engine.requests["second"].num_computed_tokens == 0
    engine.run_out()
    assert told(engine, "second")
    engine.scheduler.reset_prefix_cache()
    engine.add("third", [*longer, 5], 2)
    engine.run_out()
    assert told(engine, "third")
    assert count(engine, "loaded_tokens") >= 10 * BLOCK


def test_a_lease_that_has_an_end_is_not_promised(machine):
    """A worker would have to wait for its copies to know that they were made in time."""
    engine = machine(pages=64)
    prompt = text("over", 5 * BLOCK + 1)
    engine.add("first", prompt, 1)
    engine.run_out()
    engine.scheduler.reset_prefix_cache()
    hold = engine.store.hold
    # As with an agent that does not answer.
    ends = [True]

    def end_some_time(lease: int) -> float:
        hold(lease)
        return time.monotonic() + 60.0 if ends.pop() else math.inf

    engine.store.hold = end_some_time
    engine.add("second", prompt, 3)
    engine.run_out()
    assert told(engine, "second")
    assert not ends
    assert count(engine, "loaded_tokens") == 0
    assert count(engine, "lost_promises") == 0
    nothing_held(engine)


def test_a_promise_that_is_lost_before_the_load_is_given_back(machine):
    engine = machine(pages=64)
    prompt = text("lost", 5 * BLOCK + 1)
    engine.add("first", prompt, 1)
    engine.run_out()
    engine.scheduler.reset_prefix_cache()
    release, defects = engine.store.release, [True]

    def fail_once(lease: int, shard: int | None = None) -> None:
        if shard is not None and defects:
            defects.pop()
            raise RuntimeError("a defect")
        release(lease, shard)

    engine.store.release = fail_once
    engine.add("second", prompt, 3)
    engine.run_out()
    assert told(engine, "second")
    assert count(engine, "lost_promises") == 1
    nothing_held(engine)


def test_after_a_defect_nothing_more_is_stored_of_the_requests_there_are(machine, monkeypatch):
    engine = machine(pages=64)
    prompts = {f"r{n}": text(f"defect {n}", 2 * BLOCK - 1) for n in range(4)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, 20)
    engine.step()
    engine.step()
    advance, defects = RequestState.advance, [True]

    def fail_once(state: RequestState, *step: Any) -> None:
        if state.request.request_id == "r1" and defects:
            defects.pop()
            raise RuntimeError("a defect")
        advance(state, *step)

    # In this step each of them gets a page.
    monkeypatch.setattr(RequestState, "advance", fail_once)
    engine.step()
    assert count(engine, "errors__saves") == 1
    engine.run_out()
    engine.scheduler.reset_prefix_cache()
    for name, prompt in prompts.items():
        engine.add(f"{name} again", [*prompt, *engine.said[name]], 3)
    engine.run_out()
    assert all(told(engine, name) for name in engine.requests)
    assert count(engine, "loaded_tokens") > 0
    nothing_held(engine)


def test_what_was_not_read_before_a_reset_is_not_read_any_more(machine):
    engine = machine(pages=64, asynchronous=True)
    half = engine.scheduler.connector.scheduler
    for steps in range(2, 30):
        # Known to the engine, and not yet to its scheduler, may be the last token of a block.
        prompt = text(f"tails {steps}", 2 * BLOCK)
        engine.add(f"r{steps}", prompt, 40)
        for _ in range(steps):
            engine.step()
        engine.cancel(f"r{steps}")
        engine.finish_ordered()
        if half._tails:
            break
    assert half._tails
    said = engine.said[f"r{steps}"]
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    # The engine sleeps, and has other memory for its pages afterwards.
    for plane in engine._planes:
        plane.zero_()
    engine.add("next", text("next", BLOCK), 1)
    engine.run_out()
    # For another engine, or this one after its next start, the names are the same as before.
    half._era = None
    engine.add("again", [*prompt, *said, 1], 3)
    engine.run_out()
    assert told(engine, "again")
    assert count(engine, "loaded_tokens") > 0
    nothing_held(engine)


def test_requests_that_go_on_over_a_reset_have_nothing_to_do_with_what_was_before(machine):
    engine = machine(pages=64)
    half = engine.scheduler.connector.scheduler
    prompt = text("reset", 6 * BLOCK + 1)
    engine.add("running", prompt, 20)
    for _ in range(5):
        engine.step()
    engine.add("new", [*prompt, 1], 3)
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    engine.run_out()
    assert told(engine, "running")
    assert told(engine, "new")
    assert count(engine, "loaded_tokens") == 0
    whole = [*prompt, *engine.said["running"]]
    names = hash_blocks(chain_root(half.engine.namespace.id), whole, BLOCK)
    match = engine.store.match(names)
    engine.store.release(match.lease)
    assert 6 <= len(match.slots) < len(names) - 1
    # What came after it is stored, by another name.
    engine.scheduler.reset_prefix_cache()
    engine.add("again", [*prompt, 1], 3)
    engine.run_out()
    assert count(engine, "loaded_tokens") == 6 * BLOCK


def test_with_the_policy_fail_a_lost_load_ends_its_request_and_no_other(machine):
    engine = machine(pages=64, policy="fail")
    engine.add("first", text("fails", 4 * BLOCK + 1), 1)
    engine.run_out()
    engine.scheduler.reset_prefix_cache()
    losses = [True]
    lose(engine, lambda: losses.pop() if losses else False)
    engine.add("other", text("other", 4 * BLOCK + 1), 4)
    engine.add("second", text("fails", 4 * BLOCK + 1), 4)
    engine.run_out()
    assert engine.requests["second"].status == RequestStatus.FINISHED_ERROR
    assert told(engine, "other")
    # Its blocks are as good as before.
    engine.add("third", text("fails", 4 * BLOCK + 1), 4)
    engine.run_out()
    assert told(engine, "third")
    nothing_held(engine)
