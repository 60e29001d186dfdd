"""What the gate asks of the CUDA driver, with a driver and streams that write it down."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from kvtier.gpu.gate import Gate

DEVICE = torch.device("cuda", 0)


class Driver:
    """Entry points as attributes, and the states that they answer with."""

    def __init__(self, write: int = 0, wait: int = 0) -> None:
        self.log: list[tuple[object, ...]] = []

        def cuStreamWriteValue32_v2(stream, address, value, flags):
            self.log.append(("write", stream, address, value, flags))
            return write

        def cuStreamWaitValue32_v2(stream, address, value, flags):
            self.log.append(("wait", stream, address, value, flags))
            return wait

        self.cuStreamWriteValue32_v2 = cuStreamWriteValue32_v2
        self.cuStreamWaitValue32_v2 = cuStreamWaitValue32_v2


def stream(number: int, waited: list[object] | None = None) -> SimpleNamespace:
    waits = waited if waited is not None else []
    return SimpleNamespace(
        cuda_stream=number, record_event=lambda: f"event {number}", wait_event=waits.append,
        synchronize=lambda: None,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream(5))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def test_each_closing_has_a_word_of_its_own_and_opening_writes_that_alone():
    driver = Driver()
    gate = Gate(DEVICE, driver)
    places = []
    for _ in range(2 * gate.words):
        driver.log.clear()
        waited: list[object] = []
        gate.close(stream(7, waited), stream(8))
        (wrote, writer, address, value, _), (waits, waiter, same, least, as_high) = driver.log
        assert (wrote, writer, waits, waiter) == ("write", 8, "wait", 5)
        assert (address, value, as_high) == (same, least, 0)
        assert waited == ["event 5"]
        word = ctypes.c_uint32.from_address(address)
        assert word.value < value
        before = list(gate._word)
        gate.open()
        assert word.value == value
        assert sum(a != b for a, b in zip(before, gate._word, strict=True)) == 1
        places.append(address)
    assert len(set(places[: gate.words])) == gate.words
    assert places[: gate.words] == places[gate.words :]


@pytest.mark.parametrize("states", [(1, 0), (0, 1)])
def test_a_driver_that_refuses_holds_nothing_back(states):
    with pytest.raises(OSError, match="refuses"):
        Gate(DEVICE, Driver(*states))


def test_a_driver_without_such_calls():
    with pytest.raises(OSError, match="too old"):
        Gate(DEVICE, SimpleNamespace())
