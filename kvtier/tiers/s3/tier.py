"""The bucket as a tier: packs and index segments behind the tier protocol."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from kvtier._counters import Counters
from kvtier._logging import log_once
from kvtier.config import S3Config
from kvtier.errors import KvTierError
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.tiers.base import Deliver, StoredBlock, Tier
from kvtier.tiers.s3.breaker import Breaker
from kvtier.tiers.s3.bucket import Bucket
from kvtier.tiers.s3.catalog import Catalog
from kvtier.tiers.s3.health import Health
from kvtier.tiers.s3.heat import load_heat
from kvtier.tiers.s3.index import BlockIndex
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.open_bucket import open_bucket
from kvtier.tiers.s3.pack import window_blocks, window_bytes
from kvtier.tiers.s3.reader import BlockReader
from kvtier.tiers.s3.upkeep import Upkeep
from kvtier.tiers.s3.uploader import Uploader
from kvtier.tiers.s3.warm import Wanted, Warmer, hottest, prefix

_logger = logging.getLogger(__name__)

_UPLOADS = 8
_PACK_DELAY_SECONDS = 5.0
_LONGEST_PAUSE_SECONDS = 30.0
_PENDING_PACKS = 8
_PENDING_BYTES = 256 << 20
_WARM_BYTES_PER_SECOND = 256 << 20
_WARM_ATTEMPTS = 5
_WARM_PAUSE_SECONDS = 30.0


class S3Tier:
    """Encoded blocks in a bucket that any number of nodes share.

    Lookups are answered from an index in memory that follows the bucket's in the background; until it is
    loaded, and while the bucket does not answer, every lookup is a miss. Reads are ranged GETs of packs,
    writes are queued, packed and uploaded behind the caller's back. docs/bucket-layout.md has the bytes.

    Attributes:
        name: "s3".
    """

    name = "s3"

    def __init__(
        self,
        config: S3Config,
        namespace: Namespace,
        layout: BlockLayout,
        max_encoded_bytes: int,
        *,
        bucket: Bucket | None = None,
        pending_limit: int | None = None,
        longest_pause: float = _LONGEST_PAUSE_SECONDS,
        pack_delay: float = _PACK_DELAY_SECONDS,
        upkeep: bool = True,
        clock: Callable[[], int] = time.time_ns,
    ):
        """Start the tier. Nothing here waits for the network or fails because of it.

        Args:
            config: Where the bucket is, and how patient to be with it.
            namespace: Whose blocks these are; blocks of others are never seen.
            layout: Geometry of a block; decides how many make a pack.
            max_encoded_bytes: No payload is longer; larger ones are refused, and never fetched.
            bucket: How to reach the bucket; None for what `config` says.
            pending_limit: Bytes that may wait for upload; None for eight packs, or 256 MiB if that is more.
            longest_pause: Seconds between attempts at a bucket that does not answer, at most.
            pack_delay: Seconds after its last block until an incomplete pack is uploaded.
            upkeep: Whether to note accesses in the bucket and collect garbage, in the background.
            clock: Nanoseconds since 1970, as this node has them.
        """
        self._counters = Counters()
        self._bucket = bucket or open_bucket(config, self._counters)
        self._keys = keys = Keys(config.prefix, namespace.hex)
        self._namespace = namespace
        self._index = BlockIndex()
        self._reading = Health(
            "reading", Breaker(longest_pause, on_open=lambda: self._catalog.wake()), self._counters
        )
        self._writing = Health("writing", Breaker(longest_pause), self._counters)
        self._catalog = Catalog(
            self._bucket,
            keys,
            namespace,
            self._index,
            self._reading,
            self._writing,
            self._counters,
            max_encoded_bytes,
            config.index_refresh,
            on_ready=lambda: self._uploader.start(),
            clock=clock,
        )
        self._reader = BlockReader(
            self._bucket,
            keys,
            self._index,
            self._reading,
            self._counters,
            config.concurrency,
            patience=config.connect_timeout + 2 * config.read_timeout,
        )
        self._uploader = Uploader(
            self._bucket,
            keys,
            namespace.id,
            self._index,
            self._catalog,
            self._writing,
            self._counters,
            window_blocks=window_blocks(layout),
            max_block_bytes=max_encoded_bytes,
            pending_limit=pending_limit or max(_PENDING_BYTES, _PENDING_PACKS * window_bytes(layout)),
            pack_delay=pack_delay,
            threads=min(_UPLOADS, config.concurrency),
        )
        self._upkeep = Upkeep(
            self._bucket,
            keys,
            config.prefix,
            namespace.id,
            self._writing,
            self._counters,
            ttl=config.ttl,
            quota=config.quota,
            window=window_blocks(layout),
        )
        self._ending = threading.Event()
        self._closed = False
        self._catalog.start()
        if upkeep:
            self._upkeep.start()

    def match(self, hashes: Sequence[bytes]) -> int:
        """Return the length of the longest leading run that the index knows; from memory, without I/O."""
        if self._closed or self._reading.breaker.is_open:
            return 0
        return self._index.match(hashes)

    def read(self, hashes: Sequence[bytes], deliver: Deliver) -> None:
        """Fetch blocks with as few ranged GETs as they allow; see `Tier.read`."""
        self._reader.read(hashes, deliver)

    def write(self, blocks: Sequence[StoredBlock]) -> int:
        """Queue blocks for upload; see `Tier.write`."""
        return 0 if self._closed else self._uploader.write(blocks)

    def discard(self, hashes: Sequence[bytes]) -> None:
        """Refuse these blocks where they lie now, for as long as this process lives; deletes no object."""
        self._index.quarantine(hashes)

    def note_use(self, block_hash: bytes) -> None:
        """Note a hit, in whatever tier, by its last block; see `NotesUse`."""
        self._upkeep.heat.note(block_hash)

    def flush(self, timeout: float) -> bool:
        """Upload and publish what was written; False if some of it is not there after `timeout` seconds."""
        return self._uploader.flush(timeout)

    def wait_ready(self, timeout: float) -> bool:
        """Wait until the index is loaded for the first time; False if it is not after `timeout` seconds."""
        return self._catalog.ready.wait(timeout)

    def refresh(self) -> bool:
        """Look now for what other nodes have published; False if the bucket does not answer."""
        try:
            self._catalog.refresh()
        except Exception:  # noqa: BLE001 - counted and logged by `watched`
            return False
        return True

    def rebuild_index(self) -> int:
        """Index and publish the packs that no readable index segment lists; done in the background too.

        Returns:
            How many packs were found that way.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        return self._catalog.rebuild()

    def compact_index(self) -> None:
        """Make many small index segments few large ones; done in the background too.

        Raises:
            TierError: The bucket does not answer.
        """
        self._catalog.compact()

    def hottest(self, limit: int) -> list[Wanted]:
        """Choose the most used packs of up to `limit` bytes together, to be brought elsewhere by a `Warmer`.

        Raises:
            TierError: The bucket does not answer or refuses.
        """
        uses, _ = load_heat(self._bucket, self._keys, self._namespace.id)
        return hottest(self._index, uses, self._bucket.server_time(), limit)

    def prefix(self, hashes: Sequence[bytes], root: bytes) -> Wanted | None:
        """Return the leading blocks of a prompt that the bucket has, for a `Warmer`; None if it has none."""
        return prefix(self._index, hashes, root)

    def warm(self, sink: Tier, limit: int) -> None:
        """Begin to bring the most used packs, up to `limit` bytes, into another tier in the background."""
        threading.Thread(target=self._warm, args=(sink, limit), name="kvtier-s3-warm", daemon=True).start()

    def _warm(self, sink: Tier, limit: int) -> None:
        while not self._catalog.ready.wait(1.0):
            if self._ending.is_set():
                return
        warmer = Warmer(
            self, sink, self._namespace.id, bytes_per_second=_WARM_BYTES_PER_SECOND, stop=self._ending
        )
        for _ in range(_WARM_ATTEMPTS):
            try:
                warmed = warmer.run(self.hottest(limit))
            except KvTierError as error:
                log_once(_logger, "warm", "warming up failed, it is tried again: %s", error)
            else:
                self._counters.add("warmed_blocks", warmed.blocks)
                self._counters.add("warmed_bytes", warmed.bytes)
                if not warmed.failed:
                    return
            if self._ending.wait(_WARM_PAUSE_SECONDS):
                return

    def stats(self) -> Mapping[str, int | float]:
        """Return counters and gauges; `errors_<cause>` and `<kind>_requests` appear as they occur."""
        blocks, packs, quarantined = self._index.counts()
        return {
            **dict.fromkeys(_COUNTERS, 0),
            **self._counters.snapshot(),
            "blocks_known": blocks,
            "packs_known": packs,
            "quarantined_blocks": quarantined,
            "pending_bytes": self._uploader.pending_bytes,
            "breaker_open": int(self._reading.breaker.is_open),
            "write_breaker_open": int(self._writing.breaker.is_open),
            "ready": int(self._catalog.ready.is_set()),
        }

    def close(self, timeout: float = 10.0) -> None:
        """Flush within `timeout` seconds and end all threads; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._ending.set()
        deadline = time.monotonic() + timeout
        self._uploader.close(timeout)
        self._upkeep.close(max(0.0, deadline - time.monotonic()))
        self._catalog.close()
        self._reader.close()
        self._bucket.close()


_COUNTERS = (
    "get_requests",
    "put_requests",
    "list_requests",
    "get_bytes",
    "put_bytes",
    "blocks_read",
    "blocks_missed",
    "blocks_refused",
    "blocks_dropped",
    "packs_uploaded",
    "packs_found",
    "packs_corrupt",
    "packs_recovered",
    "index_segments_loaded",
    "index_segments_written",
    "index_segments_corrupt",
    "index_rebuilds",
    "bad_replies",
    "retries",
    "hedged_requests",
    "hedges_won",
    "namespace_mismatches",
)
