"""Where an agent's sockets lie, and the lock that makes it the only one there."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
from pathlib import Path

from kvtier._logging import log_once
from kvtier.config import Config
from kvtier.errors import ConfigError

_log = logging.getLogger(__name__)

LOCK = "lock"
LOG = "log"
HTTP = "http"
"""Other files there: the lock, the log of an agent that an engine started, the address of its HTTP server."""

_SYSTEM = Path("/run/kvtier")
_MAX_BASE_BYTES = 60
_DIGEST_BYTES = 8


def agent_directory(config: Config) -> Path:
    """Return the directory of the agent that `config` means.

    Unless the configuration names it, it is one for each user and configuration: a digest of all settings
    but the agent's own, below `$XDG_RUNTIME_DIR/kvtier`, else `/run/kvtier` where that exists and is
    writable, else `/tmp/kvtier-UID`. Two configurations that differ thus never share an agent.
    """
    if config.agent.directory is not None:
        return config.agent.directory
    settings = config.model_dump_json(exclude={"agent"})
    return _base() / hashlib.blake2b(settings.encode(), digest_size=_DIGEST_BYTES).hexdigest()


def make_directory(directory: Path) -> None:
    """Create an agent's directory, for this user alone; one that exists is closed to others.

    Raises:
        ConfigError: It cannot be created, is no directory, or belongs to another user.
    """
    try:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        _check_owner(directory)
        directory.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot hold the agent's sockets: {error.strerror}") from error


def check_directory(directory: Path) -> None:
    """See that only this user can have put sockets into a directory.

    Raises:
        FileNotFoundError: There is none.
        ConfigError: Others may have.
    """
    if _check_owner(directory).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{directory}: others may write to it; allowed: a directory of this user's alone")


def take_lock(directory: Path) -> int | None:
    """Lock an agent's directory.

    Returns:
        A descriptor that holds the lock until it, and every copy of it in other processes, is closed; None
        when somebody else has the lock: an agent runs, starts or ends.

    Raises:
        OSError: The lock file cannot be opened.
    """
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def keep(directory: Path) -> int | None:
    """Keep those away who clean up what has not been touched for long, such as systemd-tmpfiles.

    Returns:
        A descriptor that does so until it is closed; None where that cannot be had.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        log_once(_log, "keep", "%s: may be cleaned up when it is old: %s", directory, error)
        return None
    return fd


def identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from all others as long as it is in use; None if there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def remove_own(path: Path, known: tuple[int, int] | None) -> None:
    """Remove a file if it is still the one that `identity` told, and not another agent's."""
    if known is not None and identity(path) == known:
        path.unlink(missing_ok=True)


def _check_owner(directory: Path) -> os.stat_result:
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{directory}: is no directory")
    if status.st_uid != os.geteuid():
        raise ConfigError(f"{directory}: belongs to another user (uid {status.st_uid})")
    return status


def _base() -> Path:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime) and os.path.isdir(runtime) and len(os.fsencode(runtime)) <= _MAX_BASE_BYTES:
        return Path(runtime) / "kvtier"
    if os.access(_SYSTEM, os.W_OK | os.X_OK):
        return _SYSTEM
    return Path("/tmp") / f"kvtier-{os.geteuid()}"  # noqa: S108 - owner and mode are checked
