"""The process of an agent that an engine starts: `python -m kvtier.agent LOCK_FD`, configuration on stdin.

The engine's process holds the lock of the agent's directory and passes it on. This process leaves its parent,
so that the engine neither waits for the agent nor has to bury it.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Read the configuration, detach, serve."""
    lock = int(sys.argv[1])
    text = sys.stdin.read()
    if os.fork():
        os._exit(0)
    # What follows is heavy; the engine waits for the process above only.
    import logging
    import signal
    from contextlib import suppress

    from kvtier.agent.process import serve
    from kvtier.config import Config

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    os.chdir("/")
    # An engine may be bound to a few cores, and its threads may block signals: not so the agent.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    with suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        config = Config.model_validate_json(text)
        serve(config, lock=lock, linger=config.agent.linger)
    except Exception:
        logging.getLogger("kvtier.agent").exception("the agent failed")
        sys.exit(1)
    # Threads that wait for a dead disk or bucket must not keep the process.
    logging.shutdown()
    os._exit(0)


if __name__ == "__main__":
    main()
