"""The threads that do work in the background."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import CancelledError

import pytest

from kvtier._workers import Workers


def test_pool_runs_calls_on_as_many_threads_as_it_may() -> None:
    pool = Workers("test", 3)
    gate = threading.Barrier(3)
    futures = [pool.submit(lambda: gate.wait(30)) for _ in range(6)]
    assert sorted(future.result(30) for future in futures) == [0, 0, 1, 1, 2, 2]
    pool.close()


def test_pool_hands_on_exceptions_and_goes_on() -> None:
    pool = Workers("test", 1)
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result(30)
    assert pool.submit(lambda: 5).result(30) == 5
    pool.close()


def test_closing_a_pool_cancels_what_has_not_begun() -> None:
    pool = Workers("test", 1)
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> str:
        begun.set()
        assert go_on.wait(30)
        return "done"

    running, waiting = pool.submit(slow), pool.submit(lambda: "never")
    assert begun.wait(30)
    pool.close(cancel=True)
    with pytest.raises(CancelledError):
        waiting.result(30)
    with pytest.raises(CancelledError):
        pool.submit(lambda: "late").result(30)
    go_on.set()
    assert running.result(30) == "done"


def test_closing_finishes_what_is_queued_and_ends_the_threads() -> None:
    done: list[int] = []
    ended: list[str] = []
    pool = Workers("test", 2, at_end=lambda: ended.append(threading.current_thread().name))
    for index in range(20):
        pool.run(lambda index=index: done.append(index))
    pool.close(30)
    assert sorted(done) == list(range(20))
    assert set(ended) == {"kvtier-test"}
    assert not [thread for thread in threading.enumerate() if thread.name == "kvtier-test"]


def test_a_job_that_raises_is_logged_and_costs_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    class OfItsOwn(Exception):
        """Logged once a minute for each kind: one that no other test raises."""

    def fail() -> None:
        raise OfItsOwn

    pool = Workers("test", 1)
    with caplog.at_level(logging.WARNING):
        pool.run(fail)
        assert pool.submit(lambda: "next").result(30) == "next"
        pool.close(30)
    assert "a background job failed" in caplog.text


def test_a_pool_may_be_closed_by_a_thread_of_its_own() -> None:
    pool = Workers("test", 1)
    pool.submit(lambda: pool.close(30)).result(10)


def no_threads(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(threading.Thread, "start", start)


def test_a_process_that_may_have_no_more_threads_queues_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller may be an engine's thread, and the call a read from a bucket that hangs."""
    pool = Workers("test", 2)
    with monkeypatch.context() as patch:
        no_threads(patch, "can't start new thread")
        waiting = pool.submit(threading.get_ident)
        assert not waiting.done()
    later = pool.submit(threading.get_ident)
    assert threading.get_ident() not in {waiting.result(30), later.result(30)}
    pool.close(30)


def test_at_the_interpreters_end_calls_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    no_threads(monkeypatch, "can't create new thread at interpreter shutdown")
    assert Workers("test", 2).submit(threading.get_ident).result(0) == threading.get_ident()
