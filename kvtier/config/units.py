"""Sizes such as `64GiB` and durations such as `250ms`: reading and writing them."""

from __future__ import annotations

import difflib
import re
from fractions import Fraction

SIZE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "PB": 10**15,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
}
"""Bytes in each unit of size."""

DURATION_UNITS = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
"""Seconds in each unit of duration."""

_NUMBER = r"[0-9]{1,18}(\.[0-9]{1,18})?"
SIZE_PATTERN = rf"([0-9]{{1,18}}|{_NUMBER} ?({'|'.join(SIZE_UNITS)}))"
DURATION_PATTERN = rf"{_NUMBER} ?({'|'.join(DURATION_UNITS)})"

_ALLOWED_SIZE = f"a whole number of bytes, or a number with a unit ({', '.join(SIZE_UNITS)}), such as 64GiB"
_ALLOWED_DURATION = f"a number with a unit ({', '.join(DURATION_UNITS)}), such as 250ms"


def parse_size(value: object) -> int:
    """Read a size.

    Args:
        value: Whole bytes as an integer, or text: whole bytes, or a number with a unit of `SIZE_UNITS`.

    Returns:
        Bytes, a fraction of a byte rounded down.

    Raises:
        ValueError: It is no size; the message says what is allowed.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"is no size; allowed: {_ALLOWED_SIZE}")
        return value
    if isinstance(value, str) and re.fullmatch(SIZE_PATTERN, value):
        number, unit = _split(value)
        return int(Fraction(number) * SIZE_UNITS[unit or "B"])
    raise ValueError(f"is no size; allowed: {_ALLOWED_SIZE}{_size_hint(value)}")


def parse_duration(value: object) -> float:
    """Read a duration.

    Args:
        value: Text, a number with a unit of `DURATION_UNITS`.

    Returns:
        Seconds.

    Raises:
        ValueError: It is no duration, or a number without a unit; the message says what is allowed.
    """
    if isinstance(value, str) and re.fullmatch(DURATION_PATTERN, value):
        number, unit = _split(value)
        return float(Fraction(number) * DURATION_UNITS[unit])
    bare = isinstance(value, int | float) and not isinstance(value, bool)
    if bare or (isinstance(value, str) and re.fullmatch(_NUMBER, value)):
        raise ValueError(f"has no unit; allowed: {_ALLOWED_DURATION}")
    raise ValueError(f"is no duration; allowed: {_ALLOWED_DURATION}")


def format_size(size: int) -> str:
    """Write bytes in the largest binary unit that fits, to two decimals: 1.5GiB."""
    units = {name: factor for name, factor in SIZE_UNITS.items() if name == "B" or "i" in name}
    name = max((n for n, factor in units.items() if factor <= max(size, 1)), key=units.__getitem__)
    return _trim(size / units[name], 2) + name


def format_duration(seconds: float) -> str:
    """Write seconds in the largest unit that fits, to three decimals: 250ms, 2s, 1.5m."""
    fitting = [name for name, factor in DURATION_UNITS.items() if factor <= seconds]
    name = fitting[-1] if fitting else "ms"
    return _trim(seconds / float(DURATION_UNITS[name]), 3) + name


def _split(text: str) -> tuple[str, str]:
    number = text.rstrip("BKMGTPimsh ")
    return number, text[len(number) :].strip()


def _trim(number: float, decimals: int) -> str:
    return f"{number:.{decimals}f}".rstrip("0").rstrip(".")


def _size_hint(value: object) -> str:
    """Guess which unit was meant by `64gb`, `64G` or `64Gi`."""
    match = re.fullmatch(r"\s*[0-9.]+\s*([A-Za-z]+)\s*", value) if isinstance(value, str) else None
    if match is None:
        return ""
    by_lower = {unit.lower(): unit for unit in SIZE_UNITS}
    close = difflib.get_close_matches(match[1].lower(), by_lower, n=1)
    return f"; did you mean the unit {by_lower[close[0]]}?" if close else ""
