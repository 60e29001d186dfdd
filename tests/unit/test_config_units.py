"""Sizes and durations: what is read, what is refused, and the way back."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvtier.config import format_duration, format_size, parse_duration, parse_size
from kvtier.config.units import DURATION_UNITS, SIZE_UNITS

BINARY = [name for name in SIZE_UNITS if name == "B" or "i" in name]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (4096, 4096),
        (0, 0),
        ("4096", 4096),
        ("0B", 0),
        ("64GiB", 64 * 2**30),
        ("64 GiB", 64 * 2**30),
        ("500GB", 500 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("0.1KiB", 102),
        ("1KB", 1000),
        ("2PB", 2 * 10**15),
        ("0.000001MB", 1),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "64gb",
        "64G",
        "64Gi",
        "64  GiB",
        " 64GiB",
        "64GiB\n",
        "-1GiB",
        "1e3MB",
        "1,5GiB",
        ".5GiB",
        "5.GiB",
        "٤GiB",
        "1.5",
        "9" * 19 + "B",
        "64GiB/s",
        "inf",
        "nan",
        -1,
        1.5,
        True,
        None,
        [],
        {},
    ],
)
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(ValueError, match=r"is no size; allowed: .*64GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "unit"), [("64gb", "GB"), ("64G", "GB"), ("64Gi", "GiB"), ("3 mib", "MiB"), ("1 tb", "TB")]
)
def test_a_near_unit_is_suggested(text: str, unit: str) -> None:
    with pytest.raises(ValueError, match=rf"did you mean the unit {unit}\?$"):
        parse_size(text)


def test_a_far_unit_is_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"such as 64GiB$"):
        parse_size("64 apples")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("250ms", 0.25),
        ("2s", 2.0),
        ("2 s", 2.0),
        ("1m", 60.0),
        ("1h", 3600.0),
        ("1.5h", 5400.0),
        ("0ms", 0.0),
        ("0.5ms", 0.0005),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("value", [0, 1, 2.5, "50", "2.5"])
def test_a_plain_number_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match=r"has no unit; allowed: a number with a unit .*250ms"):
        parse_duration(value)


@pytest.mark.parametrize(
    "value", ["", "ms", "2sec", "2 S", "-1s", "1m30s", "1d", "5us", "2s ", True, None, []]
)
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no duration; allowed: a number with a unit .*250ms"):
        parse_duration(value)


@settings(deadline=None)
@given(st.integers(0, 10**18 - 1), st.sampled_from(list(SIZE_UNITS)))
def test_a_whole_size_is_exact(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == count * SIZE_UNITS[unit]


@settings(deadline=None)
@given(st.integers(1, 1023), st.sampled_from(BINARY))
def test_a_round_size_survives_the_round_trip(count: int, unit: str) -> None:
    size = count * SIZE_UNITS[unit]
    assert format_size(size) == f"{count}{unit}"
    assert parse_size(format_size(size)) == size


@settings(deadline=None)
@given(st.integers(0, 2**60))
@example(1111)
def test_any_size_is_written_within_half_a_percent(size: int) -> None:
    # And a fraction of a byte that is not read.
    assert abs(parse_size(format_size(size)) - size) <= 0.005 * size + 1


@settings(deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(list(DURATION_UNITS)))
def test_a_whole_duration_is_exact(count: int, unit: str) -> None:
    assert parse_duration(f"{count}{unit}") == float(count * DURATION_UNITS[unit])


@settings(deadline=None)
@given(st.floats(0.001, 1e6))
def test_any_duration_is_written_within_a_thousandth(seconds: float) -> None:
    assert abs(parse_duration(format_duration(seconds)) - seconds) <= 0.001 * seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0ms"), (0.25, "250ms"), (2.0, "2s"), (90.0, "1.5m"), (3600.0, "1h"), (0.0005, "0.5ms")],
)
def test_durations_as_people_write_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@settings(deadline=None)
@given(st.text("0123456789.BKMGTPimsh -", max_size=12))
def test_any_text_is_a_number_or_refused_in_words(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            result: float = parse(text)
        except ValueError as error:
            result = -1 if "allowed" not in str(error) else 0
        assert result >= 0
