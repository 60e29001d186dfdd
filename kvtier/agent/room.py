"""Makes room for an agent: those of the same user's other configurations end if nobody uses them."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from kvtier._logging import log_once
from kvtier.agent import wire
from kvtier.agent.place import check_directory
from kvtier.errors import KvTierError

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 2.0


def ask_for_room(directory: Path, patience: float) -> None:
    """Ask the agents beside `directory` to end, and wait for those that do.

    A configuration that was changed has another agent. The one before would keep its memory for some time,
    and a machine that has been given away to the last page does not hold two.

    Args:
        directory: Of the agent that needs room.
        patience: Seconds that one of them may take to write what is pending.
    """
    for other in sorted(directory.parent.iterdir()):
        if other == directory or not (other / wire.DOOR).exists():
            continue
        try:
            check_directory(other)
            _ask(other / wire.DOOR, patience)
        except (OSError, KvTierError) as error:
            # A dead one, or none of ours.
            log_once(_log, str(other), "%s: nobody to ask for room: %s", other, error)


def _ask(door: Path, patience: float) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(str(door))
        connection.sendall(wire.leave_frame())
        # It answers, and the connection ends: at once, or, if it does what it was asked, with its process.
        while connection.recv(wire.FRAME_HEADER_BYTES):
            connection.settimeout(patience)
