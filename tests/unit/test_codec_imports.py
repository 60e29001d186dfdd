"""The compiler (numba) is loaded where blocks are encoded and decoded, not in an engine that has an agent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest


def loads_numba(code: str) -> bool:
    """Run `code` in a fresh interpreter."""
    check = f"import sys\n{code}\nprint('numba' in sys.modules or 'llvmlite' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    return {"True": True, "False": False}[done.stdout.split()[-1]]


@pytest.mark.parametrize(
    "module", ["kvtier.trtllm", "kvtier.vllm", "kvtier.agent.client", "kvtier.store", "kvtier.hashing"]
)
def test_an_engine_does_not_load_the_compiler(module: str) -> None:
    if module == "kvtier.vllm" and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    assert not loads_numba(f"import {module}")


RAW_SLOTS = """
from kvtier.codec import slot_form
from kvtier.layout import BlockLayout
layout = BlockLayout("bfloat16", 32, 2, 2, 32 * 64, head_dim=64)
slot_form(layout).whole(b"")
"""


def test_slots_as_the_engine_has_them_need_no_compiler() -> None:
    assert not loads_numba(RAW_SLOTS)


@pytest.mark.parametrize(
    "made", ["BlockCodec(layout, bytes(16))", "slot_form(layout, 'planes')"], ids=["codec", "plane slots"]
)
def test_what_works_on_blocks_has_loaded_it_when_it_is_made(made: str) -> None:
    # So nobody waits for it when the first block comes.
    assert loads_numba(f"{RAW_SLOTS}\nfrom kvtier.codec import BlockCodec\n{made}")


def test_an_agent_has_loaded_it_before_the_first_engine_comes() -> None:
    assert loads_numba("import kvtier.agent.process")
