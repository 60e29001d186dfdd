"""Requests as the server sees them: counted by a proxy before it, not by the client."""

from __future__ import annotations

import threading
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

from kvtier.config import S3Config
from kvtier.layout import BlockLayout
from kvtier.tiers.base import Buffer
from kvtier.tiers.s3 import S3Tier
from kvtier.tiers.s3.keys import Keys
from kvtier.tiers.s3.pack import Pack, pack_name, window_blocks
from kvtier.tiers.s3.pack_table import PackTable
from kvtier.tiers.s3.segment import write_segments
from tests.faults.s3_proxy import FaultyProxy
from tests.s3_support import (
    BUCKET,
    LAYOUT,
    NAMESPACE,
    SCRATCH_KEYS,
    WINDOW,
    S3Place,
    chain,
    eventually,
    hashes_of,
    payloads_of,
    read_all,
)

TOKENS = 65_536


@pytest.fixture
def counted(s3_bucket: S3Place) -> Iterator[tuple[FaultyProxy, Counter[str]]]:
    counts: Counter[str] = Counter()

    def count(method: str, path: str, headers: dict[str, str]) -> None:
        kind = "LIST" if "list-type" in path else method
        counts[f"{kind} {'packs' if '.kvp' in path else 'index' if 'kvi' in path else 'other'}"] += 1

    with FaultyProxy(s3_bucket.server.endpoint) as proxy:
        proxy.choose = count
        yield proxy, counts


def test_a_prefix_of_64k_tokens(s3_bucket: S3Place, counted: tuple[FaultyProxy, Counter[str]]) -> None:
    """At most 70 PUTs to save it, none to look it up, 70 GETs to load it, never a HEAD; a miss is free."""
    proxy, counts = counted
    config = s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600, concurrency=32)
    blocks = chain(TOKENS // LAYOUT.tokens_per_block, size=1_500)
    writer = s3_bucket.tier(config=config)
    counts.clear()
    assert writer.write(blocks) == len(blocks)
    assert writer.flush(60)
    writer.close()
    assert counts["PUT packs"] == len(blocks) // WINDOW <= 70
    assert counts["PUT index"] <= 10
    assert set(counts) == {"PUT packs", "PUT index"}

    reader = s3_bucket.tier(config=config)
    counts.clear()
    assert reader.match(hashes_of(blocks)) == len(blocks)
    assert reader.match([bytes(16)]) == 0
    assert read_all(reader, [bytes(16)]) == {bytes(16): None}
    assert not counts
    assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
    assert set(counts) == {"GET packs"}
    # On a busy machine late replies are asked for a second time, within the hedges' share.
    assert len(blocks) // WINDOW <= counts["GET packs"] <= 70
    reader.close()


LAYOUT_8B = BlockLayout("bfloat16", tokens_per_block=32, layers=32, kv_factor=2, row_elements=8 * 128 * 32)
ENCODED_8B = LAYOUT_8B.block_bytes * 2 // 3
"""Bytes of an encoded block: real KV of a bfloat16 model has a ratio of 1.5."""


class SparseServer:
    """An S3 server whose packs hold nothing but zeros, as many as the index says; it keeps a log.

    Attributes:
        log: Method and target of each request.
    """

    def __init__(self, objects: dict[str, bytes], pack_bytes: int) -> None:
        self.log: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.log.append(f"GET {self.path}")
                path = unquote(urlsplit(self.path).path)
                body = objects.get(path.removeprefix(f"/{BUCKET}/"))
                if "list-type" in self.path:
                    prefix = unquote(self.path.partition("prefix=")[2].partition("&")[0])
                    lines = "".join(
                        f"<Contents><Key>{key}</Key><Size>{len(data)}</Size>"
                        "<LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
                        for key, data in sorted(objects.items())
                        if key.startswith(prefix)
                    )
                    more = "<IsTruncated>false</IsTruncated>"
                    page = f"<ListBucketResult>{more}{lines}</ListBucketResult>".encode()
                    self.answer(200, "", memoryview(page), len(page))
                    return
                size = len(body) if body is not None else pack_bytes
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                start, end = (int(first), int(last)) if first else (max(0, size - int(last)), size - 1)
                zeros = memoryview(bytes(1 << 20))
                content = memoryview(body)[start : end + 1] if body is not None else zeros
                self.answer(206, f"bytes {start}-{end}/{size}", content, end + 1 - start)

            def do_PUT(self) -> None:
                server.log.append(f"PUT {self.path}")
                left, room = int(self.headers["Content-Length"]), memoryview(bytearray(1 << 20))
                while left:
                    left -= self.rfile.readinto(room[: min(left, len(room))])
                self.answer(200, "", memoryview(b""), 0)

            def answer(self, status: int, content_range: str, piece: memoryview, length: int) -> None:
                self.send_response_only(status)
                self.send_header("ETag", '"1"')
                if content_range:
                    self.send_header("Content-Range", content_range)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                while length:
                    self.wfile.write(piece[: min(length, len(piece))])
                    length -= min(length, len(piece))

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # Clients leave replies that others have overtaken.
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> SparseServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_64k_tokens_of_an_8b_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 5.7 GB of it: at most 70 GETs and, saved, 70 PUTs in the server's log, and the index segments."""
    monkeypatch.setenv(SCRATCH_KEYS[0], "key")
    monkeypatch.setenv(SCRATCH_KEYS[1], "secret")
    blocks = chain(TOKENS // LAYOUT_8B.tokens_per_block, size=1)
    window = window_blocks(LAYOUT_8B)
    keys = Keys("p", NAMESPACE.hex)
    packs = []
    for start in range(0, len(blocks), window):
        some = blocks[start : start + window]
        lengths = array("I", [ENCODED_8B] * len(some))
        offsets = array("Q", [16 + ENCODED_8B * place for place in range(len(some))])
        hashes = tuple(hashes_of(some))
        size = 16 + sum(lengths) + 48 + 48 * len(some)
        packs.append(Pack(pack_name(hashes), size, some[0].parent, start, hashes, offsets, lengths))
    [segment] = write_segments(PackTable.of(packs), NAMESPACE.id)
    objects = {keys.namespace: NAMESPACE.document().encode(), keys.new_segment(1): segment}
    settings = {
        "bucket": BUCKET,
        "prefix": "p",
        "access_key_env": SCRATCH_KEYS[0],
        "secret_key_env": SCRATCH_KEYS[1],
        "index_refresh": 3600,
    }
    arguments = NAMESPACE, LAYOUT_8B, LAYOUT_8B.block_bytes + 4096

    with SparseServer(objects, packs[0].size) as server:
        reader = S3Tier(S3Config(**settings, endpoint=server.endpoint), *arguments)
        eventually(lambda: reader.stats()["index_rebuilds"])
        server.log.clear()
        assert reader.match(hashes_of(blocks)) == len(blocks)
        assert server.log == []
        came: Counter[int] = Counter()

        def deliver(block_hash: bytes, payload: Buffer | None) -> None:
            came[len(payload) if payload is not None else -1] += 1

        reader.read(hashes_of(blocks), deliver)
        assert came == {ENCODED_8B: len(blocks)}
        assert all(line.startswith("GET ") and ".kvp" in line for line in server.log)
        print("GETs:", len(server.log))
        assert 60 <= len(server.log) <= 70
        reader.close(0)

    payload = bytes(ENCODED_8B)
    with SparseServer({keys.namespace: NAMESPACE.document().encode()}, 0) as server:
        writer = S3Tier(S3Config(**settings, endpoint=server.endpoint), *arguments)
        eventually(lambda: writer.stats()["index_rebuilds"])
        server.log.clear()
        for block in blocks:
            # As the store does: what does not fit into the queue is offered again.
            eventually(lambda block=block: writer.write([replace(block, payload=payload)]), 300)
        assert writer.flush(300)
        kinds = Counter("packs" if ".kvp" in line else "index" for line in server.log)
        print("PUTs:", dict(kinds))
        assert all(line.startswith("PUT ") for line in server.log)
        assert kinds["packs"] == len(blocks) // window <= 70
        writer.close()


def test_a_chain_that_grows_slowly_becomes_whole_packs(
    s3_bucket: S3Place, counted: tuple[FaultyProxy, Counter[str]]
) -> None:
    """Generation completes one block after the other; each comes well before its window has waited enough."""
    proxy, counts = counted
    writer = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600))
    blocks = chain(2 * WINDOW, size=500)
    counts.clear()
    for block in blocks:
        assert writer.write([block]) == 1
    eventually(lambda: counts["PUT packs"] == 2)
    assert writer.flush(60)
    assert counts["PUT packs"] == 2
    writer.close()


def test_a_compacted_index_is_read_with_few_requests(
    s3_bucket: S3Place, counted: tuple[FaultyProxy, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, counts = counted
    monkeypatch.setattr("kvtier.tiers.s3.compaction.FEWEST_SEGMENTS", 5)
    monkeypatch.setattr("kvtier.tiers.s3.compaction._SETTLED", 0)
    config = s3_bucket.config(index_refresh=3600)
    writer = s3_bucket.tier(config=config)
    chains = [chain(3, size=100, seed=seed) for seed in range(8)]
    for blocks in chains:
        writer.write(blocks)
        assert writer.flush(60)
    assert len(s3_bucket.keys("index")) == len(chains)
    writer.compact_index()
    monkeypatch.setattr("kvtier.tiers.s3.compaction.GRACE", 0)
    writer.compact_index()
    assert len(s3_bucket.keys("index")) == 1
    for _ in range(2):
        reader = s3_bucket.tier(config=s3_bucket.config(endpoint=proxy.endpoint, index_refresh=3600))
        assert counts["GET index"] == 1
        assert counts["GET packs"] == 0
        for blocks in chains:
            assert read_all(reader, hashes_of(blocks)) == payloads_of(blocks)
        reader.close()
        counts.clear()
        assert writer.refresh()
    writer.close()
