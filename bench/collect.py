"""CPU, memory and requests of a run of garbage collection, on a bucket in memory with synthetic packs.

python bench/collect.py                                   1 million blocks in packs of 32
python bench/collect.py --blocks 10000000 --per-pack 10   1 million packs
"""

from __future__ import annotations

import argparse
import threading
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
from index import NAMESPACE, resident, synthetic

from kvtier.tiers.s3.bucket import ListedObject, ObjectMissing
from kvtier.tiers.s3.gc import Collector
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.lease import NoLease
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import write_segments

NOW = 1.7e9
PAGE = 1000
CHAIN = 8


class MemoryBucket:
    """Holds index segments, and knows the names of packs; counts requests. A `Bucket` as far as it goes."""

    def __init__(self, table: PackTable) -> None:
        self.keys = Keys("p", NAMESPACE.hex())
        self.requests: Counter[str] = Counter()
        segments = write_segments(table, NAMESPACE)
        self._segments = {self.keys.new_segment(place): body for place, body in enumerate(segments, 1)}
        self._packs = sorted(table.names())
        self._size = int(table.packs["size"][0])

    def list(self, prefix: str, start_after: str = "") -> Iterator[ListedObject]:
        """See `Bucket.list`."""
        self.requests["LIST"] += 1
        if prefix == self.keys.index:
            for key, body in self._segments.items():
                yield ListedObject(key, len(body), NOW - 1e6)
        elif prefix == self.keys.packs:
            for place, name in enumerate(self._packs, 1):
                self.requests["LIST"] += place % PAGE == 0
                yield ListedObject(self.keys.pack(name), self._size, NOW - 1e6)
        elif prefix == "p/" and start_after < f"p/{NAMESPACE.hex()}0":
            yield ListedObject(self.keys.namespace, 10, NOW - 1e6)

    def get_range(self, key: str, offset: int, into: memoryview) -> None:
        """See `Bucket.get_range`."""
        self.requests["GET"] += 1
        into[:] = self._segments[key][offset : offset + len(into)]

    def get_tail(self, key: str, length: int) -> tuple[bytes, int]:
        """See `Bucket.get_tail`."""
        self.requests["GET"] += 1
        raise ObjectMissing(key)

    def put(self, key: str, body: bytes) -> bool:
        """See `Bucket.put`."""
        self.requests["PUT"] += 1
        return True

    def delete(self, key: str) -> None:
        """See `Bucket.delete`."""
        self.requests["DELETE"] += 1

    def server_time(self) -> float:
        """See `Bucket.server_time`."""
        return NOW


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--per-pack", type=int, default=32)
    parser.add_argument("--all-old", action="store_true", help="every pack is older than the ttl")
    arguments = parser.parse_args()
    table = synthetic(arguments.blocks, arguments.per_pack, np.random.default_rng(1))
    # Chains of eight packs each.
    table.packs["position"] = np.arange(len(table)) % CHAIN * arguments.per_pack
    table.packs["parent"][1:] = table.blocks["hash"][arguments.per_pack - 1 :: arguments.per_pack][:-1]
    bucket = MemoryBucket(table)
    packs = len(table)
    del table

    before, most, ended = resident(), [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            most[0] = max(most[0], resident())

    threading.Thread(target=watch).start()
    start = time.process_time()
    collector = Collector(
        bucket,  # type: ignore[arg-type]
        "p",
        ttl=1e5 if arguments.all_old else 1e7,
        windows={NAMESPACE.hex(): arguments.per_pack},
    )
    done = collector.carry_out(collector.plan(), NoLease())
    busy = time.process_time() - start
    ended.set()
    print(
        f"{packs} packs, {arguments.blocks} blocks: {busy:.1f} s of CPU, "
        f"{(most[0] - before) >> 20} MiB at most, "
        f"{done.condemned} condemned, requests {dict(bucket.requests)}"
    )


if __name__ == "__main__":
    main()
