"""Starting an agent from an engine's process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kvtier.agent.forks import close_in_children
from kvtier.agent.place import LOG, make_directory, take_lock
from kvtier.config import Config


def launch(config: Config, directory: Path) -> bool:
    """Start an agent for `directory`, unless there is one, or one that starts or ends.

    The lock of the directory is taken here and passed on to the new process: of several engines that start at
    the same time one starts the agent, and the others find the lock taken. The agent writes its log to the
    file `log` there; the one before is kept as `log.old`.

    Returns:
        Whether one was started. It takes some time until it listens.

    Raises:
        ConfigError: The directory cannot be used.
        OSError: The process cannot be started.
    """
    make_directory(directory)
    lock = take_lock(directory)
    if lock is None:
        return False
    # An object that closes the descriptor, here and in children that are forked meanwhile.
    holder = os.fdopen(lock, "r+")
    close_in_children(holder)
    try:
        log = directory / LOG
        if log.exists():
            log.replace(directory / f"{LOG}.old")
        with open(log, "ab", opener=_private) as output:
            subprocess.run(
                [sys.executable, "-m", "kvtier.agent", str(lock)],
                input=config.model_dump_json().encode(),
                stdout=output,
                stderr=output,
                pass_fds=[lock],
                start_new_session=True,
                check=True,
            )
    except subprocess.CalledProcessError as error:
        raise OSError(f"the agent did not start: exit code {error.returncode}, see {log}") from error
    finally:
        holder.close()
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
