"""What `bench/gpu.py` has found so far: printed as it comes, and as a table whatever happens."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any


class Report:
    """Rows by kind and tokens, the parts that make them, and the time that is left.

    Attributes:
        failed: Parts that ended with an error.
    """

    def __init__(self, seconds: float, facts: dict[str, Any]) -> None:
        """Begin; parts are begun for so many seconds. `facts` stand in front of the rows."""
        self._facts = facts
        self._started = time.monotonic()
        self._deadline = self._started + seconds
        self._rows: dict[tuple[str, str, int], dict[str, Any]] = {}
        self.failed: list[str] = []

    def add(self, kind: str, name: str, tokens: int, found: dict[str, Any]) -> None:
        """Add columns to the row of a kind and a number of tokens, which `name` heads, and print them."""
        row = self._rows.setdefault((kind, name, tokens), {"kind": kind, name: tokens})
        row.update(found)
        print(json.dumps({"kind": kind, name: tokens, **found}), flush=True)

    def part(self, name: str, measure: Callable[[], None]) -> None:
        """Run a part, say how long it took, and go on without it should it fail or come too late."""
        if time.monotonic() >= self._deadline:
            print(f"-- {name}: skipped, the time is up (--minutes)", flush=True)
            return
        started = time.monotonic()
        ended = "done"
        try:
            measure()
        except Exception as error:  # noqa: BLE001 - the other parts may go well
            traceback.print_exc()
            self.failed.append(name)
            ended = f"failed: {error}"
        now = time.monotonic()
        print(
            f"-- {name}: {ended}; {now - started:.1f} s, {now - self._started:.1f} s since the start",
            flush=True,
        )

    def print(self) -> None:
        """Print all rows as JSON and as a table."""
        rows = list(self._rows.values())
        names = list(dict.fromkeys(name for row in rows for name in row))
        lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
        lines += ["| " + " | ".join(str(row.get(name, "")) for name in names) + " |" for row in rows]
        print(json.dumps({**self._facts, "failed": self.failed, "rows": rows}))
        print("\n".join(lines), flush=True)

    def print_when_told_to_end(self) -> None:
        """Print the table at once should the process be told to end: what is open then may take long."""

        def end(number: int, frame: FrameType | None) -> None:
            for known in (signal.SIGINT, signal.SIGTERM):
                signal.signal(known, signal.SIG_IGN)
            self.print()
            # A finalizer that runs at the time swallows the exception: then at least no part is begun.
            self._deadline = 0.0
            raise SystemExit(128 + number)

        for known in (signal.SIGINT, signal.SIGTERM):
            signal.signal(known, end)
