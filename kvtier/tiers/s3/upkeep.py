"""What a node does for the bucket in the background: leave summaries of its accesses, and collect garbage."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.errors import AccessDenied, KvTierError
from kvtier.tiers.s3.bucket import Bucket
from kvtier.tiers.s3.gc import Collector, Done, Interrupted
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.heat import HeatLog
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import Lease, LeaseLost, NoConditionalPut

_logger = logging.getLogger(__name__)

HEAT_SECONDS = 600.0
COLLECT_SECONDS = 3600.0
_JITTER = (0.75, 1.25)


class Upkeep:
    """Owns the background thread for summaries and garbage, of which at most one node collects at a time."""

    def __init__(
        self,
        bucket: Bucket,
        keys: Keys,
        prefix: str,
        namespace: bytes,
        writing: Health,
        counters: Counters,
        *,
        ttl: float | None,
        quota: int | None,
        window: int,
    ):
        """Prepare; `start` runs the thread.

        Args:
            bucket: The bucket.
            keys: Keys of this node's namespace.
            prefix: The prefix whose garbage is collected, all namespaces together.
            namespace: The namespace's id.
            writing: Health of that direction; while its breaker is open nothing is written.
            counters: Gets what happened.
            ttl: Seconds without a use after which packs go; None: never.
            quota: Bytes that may stay; None: any.
            window: Blocks of a whole pack of this namespace.
        """
        self.heat = HeatLog()
        self._bucket = bucket
        self._keys = keys
        self._prefix = prefix
        self._namespace = namespace
        self._writing = writing
        self._counters = counters
        self._stop = threading.Event()
        self._collector = Collector(
            bucket, prefix, ttl=ttl, quota=quota, windows={namespace.hex(): window}, stop=self._stop
        )
        self._collects = True
        self._thread = threading.Thread(target=self._run, name="kvtier-s3-upkeep", daemon=True)

    def start(self) -> None:
        """Run the background thread."""
        self._thread.start()

    def close(self, timeout: float) -> None:
        """Write what is noted, if that takes no longer than `timeout` seconds, and let the thread end."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def collect(self) -> Done | None:
        """Collect garbage once, if this node gets the lease; None if another one has it.

        Raises:
            NoConditionalPut: There can be no lease on this server.
            TierError: The bucket does not answer or refuses, or the lease was lost; the next run goes on.
        """
        lease = Lease(self._bucket, self._prefix)
        if not lease.acquire():
            return None
        try:
            done = self._collector.carry_out(self._collector.plan(lease), lease)
        finally:
            with contextlib.suppress(KvTierError):
                lease.release()
        self._counters.add("gc_runs")
        self._counters.add("gc_deleted_packs", done.deleted)
        self._counters.add("gc_deleted_bytes", done.deleted_bytes)
        self._counters.add("gc_condemned_packs", done.condemned)
        self._counters.add("gc_merged_packs", done.merged)
        return done

    def write_heat(self) -> None:
        """Leave a summary of what was used since the last one; a bucket that does not take it loses it."""
        if self._writing.breaker.is_open:
            return
        try:
            if self.heat.write(self._bucket, self._keys, self._namespace):
                self._counters.add("heat_summaries_written")
        except Exception as error:  # noqa: BLE001 - whatever it meets there: this thread goes on
            self._counters.add("heat_failed")
            log_once(_logger, "heat", "a summary of accesses could not be written: %s", error)

    def _run(self) -> None:
        heat_at = time.monotonic() + _soon(HEAT_SECONDS)
        collect_at = time.monotonic() + _soon(COLLECT_SECONDS)
        while not self._stop.wait(max(0.0, min(heat_at, collect_at) - time.monotonic())):
            if time.monotonic() >= heat_at:
                self.write_heat()
                heat_at = time.monotonic() + _soon(HEAT_SECONDS)
            if time.monotonic() >= collect_at:
                self._collect_quietly()
                collect_at = time.monotonic() + _soon(COLLECT_SECONDS) if self._collects else float("inf")
        self.write_heat()

    def _collect_quietly(self) -> None:
        if self._writing.breaker.is_open:
            return
        try:
            self.collect()
        except (LeaseLost, Interrupted):
            self._counters.add("gc_interrupted")
        except (NoConditionalPut, AccessDenied) as error:
            # Neither passes by itself.
            self._collects = False
            log_once(_logger, "gc", "this node collects no garbage: %s", error)
        except Exception as error:  # noqa: BLE001 - whatever it meets there: this thread goes on
            self._counters.add("gc_failed")
            log_once(_logger, "gc", "collecting garbage failed, it goes on another time: %s", error)


def _soon(seconds: float) -> float:
    return seconds * random.uniform(*_JITTER)  # noqa: S311 - not for secrets
