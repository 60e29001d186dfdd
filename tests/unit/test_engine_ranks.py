"""The engine with ranks in processes of their own: what each of them is called with, and how they end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvtier.engine import Engine, EngineConfig, HashModel, Request
from kvtier.engine.group import RankError, RankLost, first_copies, kv_heads_of
from tests.agent_support import eventually
from tests.engine_support import DictLeader, DictStore, DictWorker

SIZE = 8
PROMPT = [(7 * i + 3) % 997 for i in range(5 * SIZE + 3)]
WAYS = [
    pytest.param({"version": "1.1"}, id="1.1"),
    pytest.param({"version": "1.3", "overlap": True, "max_tokens_per_step": 2 * SIZE}, id="1.3"),
    pytest.param({"version": "main", "layout": "groups", "window": 19, "overlap": True}, id="main-window"),
]


class FileLeader(DictLeader):
    """Promises what all ranks have written to a directory."""

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        found = Counter(file.name.split(".")[0] for file in Path(self.store.directory).iterdir())
        self.store.blocks = {
            bytes.fromhex(key): [] for key, count in found.items() if count == self.store.ranks
        }
        return super().get_num_new_matched_tokens(request, computed)


class FileBlocks(dict[bytes, Any]):
    """One rank's blocks, as files."""

    def __init__(self, directory: str, rank: int) -> None:
        self.directory, self.rank = directory, rank

    def file(self, key: bytes) -> Path:
        return Path(self.directory) / f"{key.hex()}.{self.rank}"

    def __getitem__(self, key: bytes) -> Any:
        import torch

        return torch.load(self.file(key))

    def __setitem__(self, key: bytes, data: Any) -> None:
        import torch

        torch.save(data, self.file(key))


class FileWorker(DictWorker):
    def __init__(self, llm_args: SimpleNamespace) -> None:
        rank = llm_args.parallel_config.rank
        store: DictStore = llm_args.store
        blocks = FileBlocks(store.directory, rank)
        llm_args.store = DictStore(blocks, store.load_async, store.save_async, random.Random(rank))
        super().__init__(llm_args)
        # The leader of rank 0 has the same arguments.
        llm_args.store = store

    def stats(self) -> dict[str, int]:
        return dict(self.store.calls)


@pytest.fixture
def place(tmp_path):
    def make(ranks: int, worker: type = FileWorker, fails_in: str = "", **ways: Any) -> Engine:
        store = DictStore(load_async=ways.pop("load_async", False), save_async=ways.pop("save_async", False))
        store.directory, store.ranks = str(tmp_path), ranks
        settings = {"num_blocks": 40, "tokens_per_block": SIZE, "tensor_parallel_size": ranks, **ways}
        engine = Engine(
            HashModel(kv_heads=4),
            EngineConfig(**settings),
            leader_class=FileLeader,
            worker_class=worker,
            llm_args={"store": store, "fails_in": fails_in},
        )
        engines.append(engine)
        return engine

    engines: list[Engine] = []
    yield make
    for engine in engines:
        engine.close()


def ask(engine: Engine, prompt: list[int] = PROMPT, tokens: int = SIZE + 4) -> list[int]:
    request_id = engine.submit(Request(prompt, tokens))
    engine.settle()
    return engine.output(request_id)


def test_every_head_is_held_and_every_rank_holds_the_same_number():
    for ranks in range(1, 9):
        for heads in range(1, 13):
            held = [kv_heads_of(rank, ranks, heads) for rank in range(ranks)]
            assert {len(part) for part in held} == {-(-heads // ranks)}
            flat = [head for part in held for head in part]
            assert sorted(set(flat)) == list(range(heads))
            assert [flat[place] for place in first_copies(ranks, heads)] == list(range(heads))
    assert [kv_heads_of(rank, 4, 2) for rank in range(4)] == [[0], [0], [1], [1]]
    assert [kv_heads_of(rank, 2, 3) for rank in range(2)] == [[0, 1], [2, 2]]


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_new_engine_loads_what_an_old_one_saved(place, ways, ranks):
    plain = Engine(
        HashModel(kv_heads=4),
        EngineConfig(num_blocks=40, tokens_per_block=SIZE, tensor_parallel_size=ranks, **ways),
    )
    expected = ask(plain)
    plain.close()
    cold = place(ranks, save_async=True, **ways)
    assert ask(cold) == expected
    assert cold.memory.keys[0].shape[1] == 4 // ranks
    warm = place(ranks, load_async=True, save_async=True, **ways)
    assert ask(warm) == expected
    assert warm.metrics(1).tokens_external == 5 * SIZE
    calls = warm.ranks.stats()
    assert len(calls) == ranks
    assert all(of_rank == calls[0] for of_rank in calls)
    for method in ("start_load_kv", "save_kv_layer", "wait_for_save"):
        assert calls[0][method] > 0
    assert calls[0]["get_finished"] == warm.iterations


@pytest.mark.parametrize("rank", range(4))
def test_one_wrong_byte_on_any_rank_changes_the_output(place, tmp_path, rank):
    import torch

    expected = ask(place(4))
    file = sorted(tmp_path.glob(f"*.{rank}"))[0]
    (rows,) = torch.load(file)
    rows[17] ^= 1
    torch.save([rows], file)
    assert ask(place(4)) != expected


class FailsOnRank1(FileWorker):
    """Fails once, in the method that the arguments name."""

    def __init__(self, llm_args: SimpleNamespace) -> None:
        super().__init__(llm_args)
        self.fails = llm_args.parallel_config.rank == 1
        self.method = llm_args.fails_in

    def _maybe(self, method: str) -> None:
        if self.fails and self.method == method:
            self.fails = False
            raise ValueError(f"{method} is broken")

    def start_load_kv(self, stream: Any) -> None:
        self._maybe("start_load_kv")
        super().start_load_kv(stream)

    def save_kv_layer(self, layer: int, stream: Any) -> None:
        self._maybe("save_kv_layer")
        super().save_kv_layer(layer, stream)

    def wait_for_save(self, stream: Any) -> None:
        self._maybe("wait_for_save")
        super().wait_for_save(stream)

    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        self._maybe("get_finished")
        # After a failed pass each rank has come to another point of it.
        self.expected = "poll"
        return super().get_finished(finished, started)


@pytest.mark.parametrize("method", ["save_kv_layer", "wait_for_save"])
def test_an_error_in_a_ranks_forward_fails_every_active_request_and_no_more(place, method):
    engine = place(2, FailsOnRank1, fails_in=method)
    engine.submit(Request(PROMPT, 5))
    engine.submit(Request(PROMPT[:9], 5))
    events = engine.run()
    assert [event.reason for event in events] == ["failed", "failed"]
    assert isinstance(events[0].error, RankError)
    assert f"rank 1: ValueError: {method} is broken" in str(events[0].error)
    assert ask(engine) == ask(place(2))


@pytest.mark.parametrize("method", ["start_load_kv", "get_finished"])
def test_an_error_in_a_ranks_other_methods_ends_the_engine(place, method):
    engine = place(2, FailsOnRank1, fails_in=method)
    engine.submit(Request(PROMPT, 5))
    with pytest.raises(RankError, match=f"rank 1: ValueError: {method} is broken"):
        engine.run()
    with pytest.raises(RuntimeError, match="died"):
        engine.step()


class UnknownOnRank1(FileWorker):
    def get_finished(self, finished: list[int], started: list[int]) -> tuple[list[int], list[int]]:
        rank = self.store.blocks.rank
        return [77] if rank == 1 else [], []


def test_an_id_that_a_rank_was_not_given_ends_the_engine(place):
    engine = place(2, UnknownOnRank1)
    engine.submit(Request(PROMPT, 5))
    with pytest.raises(KeyError):
        engine.run()


class RefusesOnRank1(FileWorker):
    def register_kv_caches(self, tensor: Any) -> None:
        if self.store.blocks.rank == 1:
            raise ValueError("no such pool")
        super().register_kv_caches(tensor)


def test_a_rank_that_refuses_its_pool_refuses_the_engine(place):
    with pytest.raises(RankError, match="rank 1: ValueError: no such pool"):
        place(2, RefusesOnRank1)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("moment", ["idle", "forward"])
def test_a_rank_that_is_killed_ends_the_engine(place, moment):
    engine = place(4)
    victim = engine.ranks.processes[1]
    if moment == "idle":
        os.kill(victim.pid, signal.SIGKILL)
        victim.join(30)
    engine.submit(Request(PROMPT, 200))
    if moment == "forward":
        engine.step()
        os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(RankLost):
        engine.run()
    others = [process.pid for process in engine.ranks.processes]
    engine.close()
    assert not any(alive(pid) for pid in others)


SCRIPT = """
from kvtier.engine import *
if __name__ == "__main__":
    engine = Engine(HashModel(), EngineConfig(tensor_parallel_size=3))
    print(*[process.pid for process in engine.ranks.processes], flush=True)
    request = engine.submit(Request(list(range(50)), 10000))
    while True:
        engine.step()
"""


def test_ranks_end_when_rank_0_is_killed(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True) as engine:
        pids = [int(pid) for pid in engine.stdout.readline().split()]
        assert [alive(pid) for pid in pids] == [True, True]
        time.sleep(random.Random(4).random() * 0.1)
        engine.kill()
    eventually(lambda: not any(alive(pid) for pid in pids), "the ranks end")
