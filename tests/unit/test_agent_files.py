"""The agent's directory: whose files they are, and what happens when nothing can be written to it."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from kvtier.agent import wire
from kvtier.agent.place import HTTP, LOCK, identity, keep, remove_own
from tests.agent_support import PROCESSES, AgentProcess, AgentThread, eventually, serve_place
from tests.store_support import chain, save


def test_an_agent_that_ends_leaves_the_sockets_of_the_next_one_alone(place):
    """Somebody has cleaned up: the directory was removed, and an engine has started another agent."""
    first = AgentThread(place)
    old = place.connect()
    shutil.rmtree(place.directory)
    place.directory.mkdir(0o700)
    with AgentThread(place):
        assert save(old, chain(1)) == 1
        first.end()
        assert {wire.DOOR, wire.DESK} <= {file.name for file in place.directory.iterdir()}
        client = place.connect()
        assert save(client, chain(2)) == 2
        client.close(1)
        # The other one's engine finds its way, too.
        assert old.wait_connected(60)
        old.close(1)


def test_only_the_file_that_was_told_is_removed(tmp_path):
    path = tmp_path / "file"
    assert identity(path) is None
    path.touch()
    known = identity(path)
    with open(path):
        path.unlink()
        path.touch()
        remove_own(path, known)
        assert path.exists()
        remove_own(path, None)
        assert path.exists()
    remove_own(path, identity(path))
    remove_own(path, known)
    assert not path.exists()


def test_a_directory_in_use_is_locked_for_those_who_clean_up(place):
    def locked() -> bool:
        fd = os.open(place.directory, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    with AgentProcess(place):
        place.connect().close(1)
        assert locked()
    assert not locked()


def test_a_directory_that_cannot_be_locked_is_used_all_the_same(tmp_path, caplog):
    assert keep(tmp_path / "none") is None
    assert "may be cleaned up" in caplog.text


def serve_on_a_full_disk(config, environment) -> None:
    """Be an agent whose files have no room for a byte."""

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = full
    Path.write_text = full
    serve_place(config, environment)


def test_on_a_full_disk_the_agent_serves(place):
    process = PROCESSES.Process(target=serve_on_a_full_disk, args=(place.config, dict(os.environ)))
    process.start()
    try:
        client = place.connect()
        assert save(client, chain(2)) == 2
        assert (place.directory / LOCK).read_text() == ""
        eventually(lambda: "No space left on device" in place.log())
        assert not (place.directory / HTTP).exists()
        client.close(1)
    finally:
        process.terminate()
        process.join(30)
    assert process.exitcode == 0


@pytest.mark.parametrize("stale", ["socket", "file", "directory"])
def test_what_lies_where_the_sockets_are_to_be_is_replaced_or_said(place, stale):
    for name in (wire.DOOR, wire.DESK):
        path = place.directory / name
        if stale == "directory":
            path.mkdir()
        elif stale == "file":
            path.write_text("no socket")
        else:
            os.mknod(path, 0o600 | 0o140000)
    if stale == "directory":
        with pytest.raises(OSError, match="Is a directory"):
            AgentThread(place)
        return
    with AgentThread(place):
        client = place.connect()
        assert save(client, chain(1)) == 1
        client.close(1)
