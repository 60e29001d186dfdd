"""Reading objects that differ from release to release: a value counts only if it has the right type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from numbers import Integral
from pathlib import PurePath
from typing import Any


def dig(source: object, *names: str) -> Any:
    """Return the attribute at the end of a path of names, None where one of them is missing."""
    for name in names:
        if source is None:
            return None
        source = getattr(source, name, None)
    return source


def as_int(value: object) -> int | None:
    """Return `value` if it is an integer (a bool is none)."""
    # Nearly always one of these; the test below is slow, and this runs for each request of each pass.
    if value is None or type(value) is int:
        return value
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_text(value: object) -> str | None:
    """Return a string, a path or an enumeration's name as text, None for everything else and for ''."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    return value if isinstance(value, str) and value else None


def as_plain(value: object) -> Any:
    """Return `value` as JSON data, None for what is none; names of enumerations and dtypes stand for them."""
    if type(value).__name__ == "dtype":
        return str(value)
    if isinstance(value, (Enum, PurePath)):
        return as_text(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(inner) for inner in value]
    return None


def as_list(value: object) -> list[Any] | None:
    """Return the items of a list, tuple or array; None for everything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return list(value)
    listed = getattr(value, "tolist", None) if hasattr(value, "__array_interface__") else None
    found = listed() if callable(listed) else None
    return found if isinstance(found, list) else None


def is_given(value: object) -> bool:
    """Say whether an optional field carries anything: true flags, non-empty containers, tensors and arrays.

    Stand-ins of tests, which answer to every name, carry nothing.
    """
    if isinstance(value, (bool, int, float)):
        return bool(value)
    if isinstance(value, (str, bytes, Mapping, Sequence)):
        return len(value) > 0
    return isinstance(getattr(value, "shape", None), tuple)
