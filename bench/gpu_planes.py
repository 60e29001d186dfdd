"""How fast blocks go between plane slots and a pool on the GPU, and from disk into plane slots.

    python bench/gpu_planes.py [--blocks 128] [--input tests/data/kv_bf16.npy]

Blocks of 4 MiB in the shape of an 8B model, pages and slots in random order; raw slots and plane slots in
turns, medians of 7, GB/s of KV. Staging: blocks made of real KV, encoded and written to files, which
lie in the page cache; threads read them, verify them and decode them into slots. "CPU ms" is what one block
costs a thread, all by itself; "parts" is what its largest parts cost alone: the entropy-coded frames
through zstd, all that is stored through XXH3, and copies out of the page cache.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from kvtier.codec import BlockCodec, PlaneSlots, StoredFile, native, read_header, slot_form
from kvtier.codec.format import PLAIN, SPLIT
from kvtier.connector.transfer import Blocks, Mover, RawMover
from kvtier.gpu import pin
from kvtier.gpu.copies import CudaCopies
from kvtier.gpu.plane_movers import CudaPlanes
from kvtier.gpu.ranges import PageMap, Region
from kvtier.hashing import Namespace
from kvtier.layout import BlockLayout
from kvtier.tiers import StoredBlock
from kvtier.tiers.disk import DiskTier
from kvtier.tiers.memory import MemoryTier

LAYOUT = BlockLayout("bfloat16", 32, 32, 2, 8 * 32 * 128, head_dim=128)
ROUNDS = 7
THREADS = (1, 4, 8, 12, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=128)
    parser.add_argument("--input", type=Path, default=Path("tests/data/kv_bf16.npy"))
    options = parser.parse_args()
    result: dict[str, Any] = {"cores": os.cpu_count()}
    if torch.cuda.is_available():
        result["machine"] = torch.cuda.get_device_name()
        result["GB/s of KV, slots and pool"] = transfers(options.blocks)
        print(json.dumps(result), flush=True)
    result["GB/s of KV, page cache to slots"] = staging(options.input, options.blocks)
    print(json.dumps(result, indent=1))


def plane_slots(layout: BlockLayout) -> PlaneSlots:
    form = slot_form(layout, "planes")
    assert isinstance(form, PlaneSlots)
    return form


def transfers(count: int) -> dict[str, Any]:
    """Measure each way of moving `count` blocks, in turns."""
    device, form = torch.device("cuda", torch.cuda.current_device()), plane_slots(LAYOUT)
    values = torch.randn(count, LAYOUT.block_bytes // 2, device=device)
    values[:, ::4000] = 0
    pool = values.bfloat16().view(torch.uint8)
    wanted = pool.clone()
    size = LAYOUT.block_bytes
    page_map = PageMap([Region(0, pool.data_ptr(), size, size, count)], 1)
    arenas = {"raw": MemoryTier(count * size, size)}
    arenas["planes"] = MemoryTier(count * (form.slot_bytes + 4096), form.slot_bytes)
    pinned = [pin(arena.buffer(), device) for arena in arenas.values()]
    copies = CudaCopies(device)
    planes = CudaPlanes(form, page_map, copies, device)
    movers: dict[str, tuple[str, Mover]] = {
        "raw": ("raw", RawMover(page_map, copies)),
        "planes": ("planes", planes),
    }
    rng = random.Random(1)
    pages = [(page,) for page in rng.sample(range(count), count)]
    blocks = {
        name: Blocks(np.array([address(arena, n) for n in rng.sample(range(count), count)], np.uint64), pages)
        for name, arena in arenas.items()
    }
    seconds: dict[str, list[float]] = {}
    host: dict[str, list[float]] = {}
    for _ in range(ROUNDS + 1):
        for name, (arena, mover) in movers.items():
            for direction, move in (("pool to slots", mover.save), ("slots to pool", mover.load)):
                if direction == "slots to pool":
                    pool.zero_()
                gpu, thread = timed(move, blocks[arena])
                seconds.setdefault(f"{name}, {direction}", []).append(gpu)
                host.setdefault(f"{name}, {direction}", []).append(thread)
            if not torch.equal(pool, wanted):
                raise SystemExit(f"{name}: the blocks did not come back")
    result: dict[str, Any] = {
        name: {
            "GB/s": round(count * size / statistics.median(times[1:]) / 1e9, 1),
            "us of the thread a block": round(statistics.median(host[name][1:]) / count * 1e6, 1),
        }
        for name, times in seconds.items()
    }
    result["kernels alone"] = kernels_alone(planes, pages)
    for registration in pinned:
        if registration is not None:
            registration.unpin()
    return result


def kernels_alone(planes: CudaPlanes, pages: list[tuple[int]]) -> dict[str, float]:
    room = planes._loads
    count = len(room.slots)
    result = {}
    with planes._places(pages[:count], room, torch.cuda.current_stream()) as place:
        for name, launch in (("split", planes._planes.split), ("merge", planes._planes.merge)):
            times = []
            for _ in range(ROUNDS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                launch(room.slots, room.slots, place)
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) / 1e3)
            result[name] = round(count * LAYOUT.block_bytes / statistics.median(times) / 1e9, 1)
    return result


def timed(move: Callable[[Any, int], None], blocks: Blocks) -> tuple[float, float]:
    """Return the seconds that the GPU and that the calling thread took."""
    stream = torch.cuda.Stream()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record(stream)
    started = time.perf_counter()
    move(blocks, stream.cuda_stream)
    taken = time.perf_counter() - started
    end.record(stream)
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, taken


def address(arena: MemoryTier, slot: int) -> int:
    return int(np.frombuffer(arena.view(slot), np.uint8).ctypes.data)


def staging(source: Path, count: int) -> dict[str, Any]:
    """Measure blocks of real KV from the page cache to slots: from plain files, and by the disk tier."""
    array = np.load(source, allow_pickle=False)
    _, layers, parts, heads, tokens, dim = array.shape
    wanted = (4 << 20) // (array[0, 0].nbytes)
    block = np.concatenate([array[i % len(array)] for i in range(-(-wanted // layers))])[:wanted]
    layout = BlockLayout("bfloat16", tokens, wanted, parts, heads * tokens * dim, head_dim=dim)
    namespace = Namespace.from_facts({"bench": "planes"})
    hashes = [
        hashlib.blake2b(bytes([number % 256, number // 256]), digest_size=16).digest()
        for number in range(count)
    ]
    result: dict[str, Any] = {"block bytes": layout.block_bytes}
    with tempfile.TemporaryDirectory() as directory:
        bound = BlockCodec(layout, namespace.id).max_encoded_bytes
        tier = DiskTier(Path(directory) / "tier", 20 * (count + 64) * bound, namespace, bound)
        encoder = BlockCodec(layout, namespace.id)
        stored = [encoder.encode(h, block.tobytes()) for h in hashes]
        result["ratio"] = round(layout.block_bytes / len(stored[0]), 4)
        result["xxhash"] = xxhash.VERSION
        tier.write(
            [StoredBlock(h, bytes(16), i, e) for i, (h, e) in enumerate(zip(hashes, stored, strict=True))]
        )
        old = BlockCodec(BlockLayout("bfloat16", tokens, wanted, parts, heads * tokens * dim), namespace.id)
        forms = {name: slot_form(layout, name) for name in ("raw", "planes")}
        codecs = {name: BlockCodec(layout, namespace.id, form) for name, form in forms.items()}
        cases = [("planes", codecs["planes"], stored), ("raw", codecs["raw"], stored)]
        cases.append(("raw, first codec", old, [old.encode(h, block.tobytes()) for h in hashes]))
        for name, codec, encoded in cases:
            memory = MemoryTier((count + 1) * (codec.form.slot_bytes + 4096), codec.form.slot_bytes)
            slots = dict(zip(hashes, [memory.view(n) for n in range(count)], strict=True))
            for slot in slots.values():
                slot[:] = bytes(len(slot))
            files = dict(zip(hashes, write_files(Path(directory) / name, encoded), strict=True))
            row = {}
            for threads in THREADS:
                if threads > (os.cpu_count() or 1):
                    continue
                # Long enough that starting the threads does not count.
                items = hashes * min(threads, 8)
                job = file_job(codec, files, slots)
                loaded = memory_job(codec, dict(zip(hashes, encoded, strict=True)), slots)
                row[f"{threads} threads, from memory"] = best(
                    lambda job=loaded, n=threads, items=items: in_threads(job, items, n), layout, len(items)
                )
                row[f"{threads} threads"] = best(
                    lambda job=job, n=threads, items=items: in_threads(job, items, n), layout, len(items)
                )
            row["CPU ms"] = cpu_ms(job, hashes)
            row["CPU ms, from memory"] = cpu_ms(loaded, hashes)
            if name != "raw, first codec":

                def by_tier(codec: BlockCodec = codec, slots: Any = slots, chains: int = 4) -> None:
                    def deliver(block: bytes, file: Any) -> None:
                        codec.decode(block, file, slots[block])

                    parts = [hashes[i::chains] * 4 for i in range(chains)]
                    in_threads(lambda chain: tier.read_files(chain, deliver), parts, chains)

                row["disk tier, one chain"] = best(lambda: by_tier(chains=1), layout, 4 * count)
                row["disk tier, four chains"] = best(by_tier, layout, 4 * count)
            if name == "planes":
                row["parts, CPU us"] = parts_us(encoded, list(files.values()), list(slots.values()))
            result[name] = row
            slots.clear()
            memory.close()
        tier.close()
    return result


def write_files(folder: Path, encoded: list[memoryview]) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}" for number in range(len(encoded))]
    for path, data in zip(paths, encoded, strict=True):
        path.write_bytes(data)
    return paths


def file_job(
    codec: BlockCodec, files: dict[bytes, Path], slots: dict[bytes, memoryview]
) -> Callable[[bytes], None]:
    room = threading.local()

    def job(block: bytes) -> None:
        descriptor = os.open(files[block], os.O_RDONLY)
        length = os.fstat(descriptor).st_size
        if codec.layout.head_dim:
            codec.decode(block, StoredFile(descriptor, length), slots[block])
        else:
            # The first codec's way: read whole, into memory that is used again.
            if not hasattr(room, "buffer"):
                room.buffer = memoryview(bytearray(codec.max_encoded_bytes))
            os.preadv(descriptor, [room.buffer[:length]], 0)
            codec.decode(block, room.buffer[:length], slots[block])
        os.close(descriptor)

    return job


def memory_job(
    codec: BlockCodec, blocks: dict[bytes, memoryview], slots: dict[bytes, memoryview]
) -> Callable[[bytes], None]:
    return lambda block: codec.decode(block, blocks[block], slots[block])


def in_threads(job: Callable[[Any], None], items: list[Any], count: int) -> None:
    def work(first: int) -> None:
        for item in items[first::count]:
            job(item)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def cpu_ms(job: Callable[[Any], Any], hashes: list[Any]) -> float:
    times = []
    for _ in range(4):
        started = time.thread_time_ns()
        for block in hashes:
            job(block)
        times.append((time.thread_time_ns() - started) / len(hashes) / 1e6)
    return round(statistics.median(times[1:]), 3)


def parts_us(encoded: list[memoryview], files: list[Path], slots: list[memoryview]) -> dict[str, float]:
    """Measure the parts of decoding a block of codec 2; every call has another block and another slot."""
    assert native.functions is not None
    libc, pointer, size = ctypes.CDLL(None), ctypes.c_void_p, ctypes.c_size_t
    zstd, xxh3 = native.functions["ZSTD_decompressDCtx"], native.functions["XXH3_64bits"]
    zstd.argtypes, zstd.restype = [pointer, pointer, size, pointer, size], size
    xxh3.argtypes, xxh3.restype = [pointer, size], ctypes.c_uint64
    libc.pread.argtypes, libc.pread.restype = [ctypes.c_int, pointer, size, ctypes.c_long], ctypes.c_ssize_t
    context = pointer(native.functions["ZSTD_createDCtx"]())
    sections = read_header(encoded[0]).sections
    frames, plain = [], [section for section in sections if section.encoding == PLAIN][-1]
    for section in sections[: sections.index(plain)]:
        half = (section.raw_bytes + 1) // 2 if section.encoding == SPLIT else 0
        if section.encoding != PLAIN:
            frames.append((section.offset + half, section.stored_bytes - half, half or section.raw_bytes))
    stored = [np.frombuffer(block, np.uint8).ctypes.data for block in encoded]
    places = [np.frombuffer(slot, np.uint8).ctypes.data for slot in slots]
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    memory, piece = np.empty(256 << 10, np.uint8), 256 << 10
    room = memory.ctypes.data

    def decompress(number: int) -> None:
        for offset, length, raw in frames:
            if zstd(context, room, raw, stored[number] + offset, length) != raw:
                raise SystemExit("a frame does not decode")

    def read(number: int, target: int, start: int, end: int, step: int) -> None:
        for offset in range(start, end, piece):
            length = min(piece, end - offset)
            if libc.pread(descriptors[number], target, length, offset) != length:
                raise SystemExit("a file cannot be read")
            target += step

    jobs: dict[str, Callable[[int], Any]] = {
        f"zstd, {sum(raw for _, _, raw in frames)} bytes": decompress,
        f"XXH3, {len(encoded[0])} bytes": lambda n: xxh3(stored[n], len(encoded[0])),
        f"read to one room, {len(encoded[0])} bytes": lambda n: read(n, room, 0, len(encoded[0]), 0),
        f"read to slots, {plain.stored_bytes} bytes": lambda n: read(
            n, places[n], plain.offset, plain.offset + plain.stored_bytes, piece
        ),
    }
    numbers: list[Any] = list(range(len(encoded)))
    result = {name: round(cpu_ms(job, numbers) * 1e3, 1) for name, job in jobs.items()}
    for descriptor in descriptors:
        os.close(descriptor)
    native.functions["ZSTD_freeDCtx"](context)
    return result


def best(work: Callable[[], None], layout: BlockLayout, count: int) -> float:
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(count * layout.block_bytes / statistics.median(times[1:]) / 1e9, 2)


if __name__ == "__main__":
    main()
