"""Pages reused as fast as they are freed, on a GPU whose streams sleep at random: no byte may be wrong.

A leader and a worker, with the streams, movers and slots that they have under an engine, run passes that
admit, cancel, finish and fail requests, and use the pages again that were freed last. Every pass checks, on
the GPU, all that it reads, and at the end all that the store would promise is compared. PyTorch's debug mode
makes each of its calls fail that waits for the GPU.

Other seeds than the clock's, one by one or as a span:

    KVTIER_STRESS_SEEDS=7,8,100-139 pytest -s tests/e2e/test_gpu_stress.py

Each run prints its seed, and it stands in the test's name.

The orders are in `CudaTransfers` (`kvtier/connector/transfer.py`); that each is needed is shown with
subclasses (`MUTILATED` in `tests/stress_support.py`) that leave out one of them and nothing else. By hand,
each of these makes `test_every_byte_is_right` fail, though not with every seed, so let it run with 40:

| method | what to take out | the same by subclass |
| --- | --- | --- |
| `load` | `engines.wait_event(event)` | `LoadsNotAwaited` |
| `load` | `self._load_stream.wait_stream(engines)` | `LoadsTooEarly` |
| `save` | `self._save_stream.wait_stream(...)` | `SavesTooEarly` |
| `order` | `self._engines(stream).wait_event(...)` | `PassesNotOrdered` |
| `poll` | `.event.query()`: take it as true | `LeasesReleasedEarly`, `CommittedEarly` |
| `after_saves` | call `done()` in any case | `TailsReportedEarly` |

So does `RunningSaves.begin` (`kvtier/trtllm/running.py`) when it returns 0: no pass then waits for any save.
"""

from __future__ import annotations

import random
import time

import pytest

torch = pytest.importorskip("torch")

from kvtier.codec import PlaneSlots, slot_form  # noqa: E402
from kvtier.connector.transfer import Blocks, CudaTransfers, Mover, RawMover  # noqa: E402
from kvtier.gpu.copies import CudaCopies  # noqa: E402
from kvtier.gpu.plane_movers import CudaPlanes  # noqa: E402
from kvtier.trtllm.pool import Pool  # noqa: E402
from tests.stress_support import (  # noqa: E402
    LAYERS,
    MUTILATED,
    PAGES,
    SLOTS,
    Counts,
    Stress,
    seeds_until_wrong,
    stress_seeds,
)
from tests.trtllm_support import memory_stores, write_config  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROW = 128 * 1024
"""Blocks of 1 MiB."""

SEEDS = stress_seeds([int(time.time()), int(time.time()) + 1])
MILLISECOND = 1_500_000
"""Clock cycles, about."""


class RealGpu:
    """Kernels on streams, with sleeps of up to two milliseconds."""

    def __init__(self, rng: random.Random, default_stream: bool) -> None:
        self._rng = rng
        self.engine = torch.cuda.default_stream() if default_stream else torch.cuda.Stream()

    def run(self, stream, kernel) -> None:
        with torch.cuda.stream(stream):
            kernel()

    def sleep(self, stream) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(self._rng.randrange(2 * MILLISECOND))

    def synchronize(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


class SleepyMover:
    """Lets a stream sleep before some copies."""

    def __init__(self, mover: Mover, gpu: RealGpu, rng: random.Random) -> None:
        self._mover, self._gpu, self._rng = mover, gpu, rng

    def load(self, blocks: Blocks, stream: int) -> None:
        self._maybe_sleep(stream)
        self._mover.load(blocks, stream)

    def save(self, blocks: Blocks, stream: int) -> None:
        self._maybe_sleep(stream)
        self._mover.save(blocks, stream)

    def _maybe_sleep(self, stream: int) -> None:
        if self._rng.random() < 0.5:
            self._gpu.sleep(torch.cuda.ExternalStream(stream))


@pytest.fixture(autouse=True)
def _kernels_are_loaded():
    """Kernels are loaded when they first run, and that waits for the whole GPU."""
    words = torch.zeros(2, 1024, dtype=torch.int64, device="cuda")
    torch.bitwise_xor(words[0], 5, out=words[1])
    words[0].fill_(-1)
    total = torch.zeros((), dtype=torch.int64, device="cuda")
    total += (words[0] != torch.bitwise_xor(words[1], 5)).any()
    torch.cuda._sleep(1000)
    torch.cuda.synchronize()


def stress(
    kind: type[CudaTransfers],
    seed: int,
    monkeypatch,
    tmp_path,
    iterations: int,
    default_stream: bool = False,
    slots: str = "raw",
) -> tuple[int, Counts, dict[str, float]]:
    monkeypatch.setenv("KVTIER_CONFIG", str(write_config(tmp_path, slots=slots)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    gpu = RealGpu(rng, default_stream)
    device = torch.device("cuda", torch.cuda.current_device())
    pool = torch.full((PAGES, LAYERS, 2, ROW), -1, dtype=torch.int16, device=device).view(torch.bfloat16)

    def transfers(pool: Pool) -> CudaTransfers:
        form, copies = slot_form(pool.layout, slots), CudaCopies(device)
        planes = isinstance(form, PlaneSlots)
        mover = CudaPlanes(form, pool.map, copies, device) if planes else RawMover(pool.map, copies)
        return kind(SleepyMover(mover, gpu, rng), torch.cuda.Stream(device), torch.cuda.Stream(device))

    with memory_stores(monkeypatch, slots=SLOTS):
        world = Stress(gpu, pool, transfers, rng)
        torch.cuda.synchronize()
        # Nothing that the engine's thread calls may wait for the GPU.
        torch.cuda.set_sync_debug_mode("error")
        wrong = world.run(iterations)
        stats = {**world.rig.worker.stats(), **world.rig.leader.stats()}
        # Memory must not be unmapped as long as it is pinned.
        world.rig.worker.close()
        world.rig.leader.close()
        return wrong, world.counts, stats


@pytest.mark.parametrize("slots", ["raw", "planes"])
@pytest.mark.parametrize("default_stream", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_byte_is_right(seed, default_stream, slots, monkeypatch, tmp_path):
    wrong, counts, stats = stress(CudaTransfers, seed, monkeypatch, tmp_path, 120, default_stream, slots)
    assert wrong == 0
    assert min(counts.loaded, counts.cancelled, counts.held, counts.ordered, stats["saved_blocks"]) > 5
    assert (stats["store_leases"], stats["store_filling_slots"]) == (0, 0)


@pytest.mark.parametrize("slots", ["raw", "planes"])
@pytest.mark.parametrize("kind", MUTILATED)
def test_without_one_of_the_orders_bytes_go_wrong(kind, slots, monkeypatch, tmp_path):
    """Shows that the test above can fail, and each order is needed."""
    runs = seeds_until_wrong(
        lambda seed: stress(kind, seed, monkeypatch, tmp_path, 150, slots=slots)[0], SEEDS[0]
    )
    print(f"{kind.__name__}, {slots}: found with seed number {runs}")
    assert runs
