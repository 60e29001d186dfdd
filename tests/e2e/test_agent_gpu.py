"""The agent's arena on a GPU: pinned by every rank, and again when a new agent brings a new one."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")

from kvtier.gpu import pin  # noqa: E402
from kvtier.layout import BlockLayout  # noqa: E402
from kvtier.store import ticket_slot  # noqa: E402
from tests.agent_support import PROCESSES, AgentProcess, Place, eventually  # noqa: E402
from tests.store_support import ROOT, chain  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCKS = 32
LAYOUT = BlockLayout("uint8", tokens_per_block=32, layers=4, kv_factor=2, row_elements=1 << 18, shards=2)
"""Shards of 2 MiB."""


def prepare(log: list[str]):
    """Pin each arena, and note what happens to it."""

    def pinned(buffer: memoryview):
        registration = pin(buffer, torch.device("cuda"))
        assert registration is not None
        log.append("pinned")

        def undo() -> None:
            registration.unpin()
            log.append("unpinned")

        return undo

    return pinned


def content(block: bytes, shard: int):
    """Return what one shard of a block holds, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(int.from_bytes(block[:6], "big") + shard)
    return torch.randint(0, 256, (LAYOUT.shard_bytes,), dtype=torch.uint8, device="cuda", generator=generator)


def host(client, slot: int, shard: int):
    """Return one shard of a slot as a tensor, seen by CUDA as pinned memory."""
    tensor = torch.frombuffer(client.slot_view(slot, shard), dtype=torch.uint8)
    assert tensor.is_pinned()
    return tensor


def fill(client, hashes, tickets, shard: int) -> None:
    """Copy one shard of blocks from the GPU to their slots, and commit it."""
    for block, ticket in zip(hashes, tickets, strict=True):
        host(client, ticket_slot(ticket), shard).copy_(content(block, shard), non_blocking=True)
    torch.cuda.synchronize()
    client.commit(tickets, shard)


def right(client, hashes, slots, shard: int) -> bool:
    """Copy one shard of slots to the GPU and compare it with what it should be."""
    loaded = [host(client, slot, shard).to("cuda", non_blocking=True) for slot in slots]
    torch.cuda.synchronize()
    return len(loaded) == len(hashes) and all(
        torch.equal(got, content(block, shard)) for got, block in zip(loaded, hashes, strict=True)
    )


def second_rank(place: Place, orders, answers) -> None:
    """Be rank 1: fill and check what rank 0 says, until there is nothing more."""
    client = place.connect(layout=LAYOUT, group="engine", rank=1, ranks=2, prepare=prepare([]))
    assert client.wait_connected(60)
    answers.put("ready")
    while (order := orders.get()) is not None:
        what, hashes, numbers = order
        if what == "fill":
            fill(client, hashes, numbers, 1)
            client.stats()
            answers.put("filled")
        else:
            answers.put(right(client, hashes, numbers, 1))
    client.close(1)


@pytest.fixture
def place():
    place = Place(2 * BLOCKS * LAYOUT.block_bytes)
    yield place
    place.remove()


def test_two_ranks_pin_one_arena_and_fill_and_load_their_shards(place):
    orders, answers = PROCESSES.Queue(), PROCESSES.Queue()
    with AgentProcess(place):
        rank = PROCESSES.Process(target=second_rank, args=(place, orders, answers), daemon=True)
        rank.start()
        client = place.connect(layout=LAYOUT, group="engine", rank=0, ranks=2, prepare=prepare([]))
        assert client.wait_connected(60)
        assert answers.get(timeout=100) == "ready"
        hashes = chain(BLOCKS)
        tickets = client.reserve(ROOT, 0, hashes)
        fill(client, hashes, tickets, 0)
        assert client.match(hashes).slots == ()
        orders.put(("fill", hashes, tickets))
        assert answers.get(timeout=100) == "filled"
        match = client.match(hashes)
        assert right(client, hashes, match.slots, 0)
        orders.put(("load", hashes, match.slots))
        assert answers.get(timeout=100) is True
        client.release(match.lease, 0)
        orders.put(None)
        rank.join(60)
        client.close(1)


def test_a_new_agents_arena_is_pinned_and_the_old_one_stays_so_for_a_while(place):
    log: list[str] = []
    now = [0.0]
    hashes, others = chain(BLOCKS), chain(BLOCKS, seed=1)

    def save(these) -> None:
        tickets = client.reserve(ROOT, 0, these)
        for shard in range(2):
            fill(client, these, tickets, shard)

    agent = AgentProcess(place)
    client = place.connect(layout=LAYOUT, prepare=prepare(log), clock=lambda: now[0])
    save(hashes)
    promised = client.match(hashes)
    agent.kill()
    eventually(lambda: not client.connected)
    with AgentProcess(place):
        eventually(lambda: client.connected)
        save(others)
        assert all(right(client, hashes, promised.slots, shard) for shard in range(2))
        assert all(right(client, others, client.match(others).slots, shard) for shard in range(2))
        assert log == ["pinned", "pinned"]
        now[0] = 61.0
        eventually(lambda: log == ["pinned", "pinned", "unpinned"])
        assert all(right(client, others, client.match(others).slots, shard) for shard in range(2))
        client.close(1)
    assert log == ["pinned", "pinned", "unpinned", "unpinned"]


def test_copies_are_as_fast_as_from_memory_of_this_process(place):
    """Printed, not judged: GB/s of loads, slots of the arena against pinned memory of torch, in turns."""
    with AgentProcess(place):
        client = place.connect(layout=LAYOUT, prepare=prepare([]))
        hashes = chain(BLOCKS)
        tickets = client.reserve(ROOT, 0, hashes)
        for shard in range(2):
            fill(client, hashes, tickets, shard)
        slots = client.match(hashes).slots
        sources = {
            "arena": [host(client, slot, shard) for slot in slots for shard in range(2)],
            "torch": [torch.empty(LAYOUT.shard_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(64)],
        }
        target = torch.empty(LAYOUT.shard_bytes, dtype=torch.uint8, device="cuda")
        times: dict[str, list[float]] = {name: [] for name in sources}
        for _ in range(20):
            for name, tensors in sources.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                for tensor in tensors:
                    target.copy_(tensor, non_blocking=True)
                torch.cuda.synchronize()
                times[name].append(time.perf_counter() - started)
        for name, seconds in times.items():
            print(name, f"{64 * LAYOUT.shard_bytes / sorted(seconds)[10] / 1e9:.1f} GB/s")
        client.close(1)
