"""The mode in which a thread calls CUDA while others capture graphs."""

from __future__ import annotations

import ctypes

import pytest

from kvtier.gpu.capture import beside_captures

GLOBAL, RELAXED = 0, 2


class Driver:
    def __init__(self) -> None:
        self.mode = GLOBAL

        def cuThreadExchangeStreamCaptureMode(place):
            mode = ctypes.c_int.from_address(place)
            self.mode, mode.value = mode.value, self.mode
            return 0

        self.cuThreadExchangeStreamCaptureMode = cuThreadExchangeStreamCaptureMode


def test_the_mode_is_relaxed_inside_and_what_it_was_afterwards():
    driver = Driver()
    with beside_captures(driver):
        assert driver.mode == RELAXED
        with beside_captures(driver):
            assert driver.mode == RELAXED
        assert driver.mode == RELAXED
    assert driver.mode == GLOBAL
    with pytest.raises(ValueError, match="inside"), beside_captures(driver):
        raise ValueError("inside")
    assert driver.mode == GLOBAL
