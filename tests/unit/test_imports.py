"""Imports point down the list of parts in docs/design.md; engines are known to their adapters alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import kvtier

ROOT = Path(kvtier.__file__).parent
ORDER = (
    "cli", "trtllm", "vllm", "connector", "agent", "store", "tiers", "gpu", "codec", "config", "hashing",
    "layout", "errors",
)  # fmt: skip
"""Top down; what stands beside the list, such as `_logging`, may be imported by all."""


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """Return the parts of kvtier that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvtier."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "kvtier":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kvtier."))
    return found - {part_of(file)}


@pytest.mark.parametrize("part", ORDER)
def test_nothing_lower_imports_anything_higher(part: str) -> None:
    files = [file for file in ROOT.rglob("*.py") if part_of(file) == part]
    assert files
    higher = set(ORDER[: ORDER.index(part)]) | {"engine"} - ({"engine"} if part == "cli" else set())
    if part in ("trtllm", "vllm"):
        higher |= {"trtllm", "vllm"} - {part}
    assert {file.name: bad for file in files if (bad := imported(file) & higher)} == {}


def test_the_reference_engine_knows_no_cache() -> None:
    files = [file for file in ROOT.rglob("*.py") if part_of(file) == "engine"]
    assert {file.name: found for file in files if (found := imported(file))} == {}


def test_engines_are_named_in_their_adapters_alone() -> None:
    names = re.compile(r"tensorrt|trt-?llm|\bvllm\b", re.IGNORECASE)
    free = {"trtllm", "vllm", "engine", "cli"}
    naming = {
        str(file.relative_to(ROOT)) for file in ROOT.rglob("*.py")
        if part_of(file) not in free and names.search(file.read_text())
    }  # fmt: skip
    assert naming == set()
