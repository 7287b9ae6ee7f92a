"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_count, format_size, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("2kb", 2000),
        ("4G", 4_000_000_000),
        ("500m", 500_000_000),
        ("2 KiB", 2048),
        ("1.5MB", 1_500_000),
        ("8.19 KB", 8190),
        ("1MiB", 1 << 20),
        ("3GB", 3_000_000_000),
        (" 2gib ", 2 << 30),
    ],
)
def test_parse(text: str, n_bytes: int) -> None:
    """Guards the units: decimal without an i, binary with one, any case."""
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 XB", "1e9", "1.2.3MB", "nan", "inf"])
def test_refuse(text: str) -> None:
    """Guards against a typo that is read as some number of bytes."""
    with pytest.raises(UsageError):
        parse_size(text)


def test_a_forgotten_unit() -> None:
    """Guards: 60 read as 60 bytes where 60 GiB are meant."""
    with pytest.raises(UsageError, match="60 is 60 bytes") as error:
        parse_size("60", 1000)
    assert error.value.remedy == "write a unit, as in 60MB or 60GiB"
    assert (parse_size("60B", 1000), parse_size("1000", 1000)) == (60, 1000)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (10_846_000_000, "10.8 GB"),
        (999_600, "1 MB"),
        (940e6, "940 MB"),
    ],
)
def test_format(n_bytes: float, text: str) -> None:
    """Guards the rounding at the unit borders."""
    assert format_size(n_bytes) == text


@given(st.integers(0, 10**14))
def test_rounded_up_is_what_is_shown(n_bytes: int) -> None:
    """Guards: a least size that is shown too small to be asked for, or far too large."""
    rounded = round_up(n_bytes)
    assert n_bytes <= rounded <= n_bytes * 1.01 + 1
    assert parse_size(format_size(rounded)) == rounded


def test_counts() -> None:
    """Guards the way parameters are written."""
    assert [format_count(n) for n in (16_376e6, 2.829e9, 360, 3.54e6)] == ["16.4B", "2.83B", "360", "3.54M"]
