"""Parse and format byte counts."""

from __future__ import annotations

import math
import re

from dsmoe_local.base.errors import UsageError

_UNITS = {
    "": 1,
    "b": 1,
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)},
}


def parse_size(text: str, least: int = 0) -> int:
    """Return the number of bytes that a size such as `2GiB` names. Raises UsageError if it is not a size.

    The unit is optional and in any case: B, K or KB, KiB, … T or TB, TiB. With `least`, 0 is refused, too,
    and a size of fewer bytes without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise UsageError(
            f"{text!r} is not a size", remedy="write a number and a unit, as in 500M, 4GB or 2GiB"
        )
    from decimal import Decimal

    size = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if size < least and not (size and match[2]):
        remedy = f"write a unit, as in {size}MB or {size}GiB" if size else "write a size above 0"
        raise UsageError(f"{text.strip()} is {size} bytes", remedy=remedy)
    return size


def format_size(n_bytes: float) -> str:
    """Format a size in decimal units with three digits: 10.8 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n_bytes) < 999.5 or unit == "GB":
            break
        n_bytes /= 1000
    return f"{n_bytes:.0f} {unit}" if unit == "B" or n_bytes >= 99.95 else f"{n_bytes:.3g} {unit}"


def round_up(n_bytes: float) -> int:
    """Round up to three significant digits, which `format_size` shows exactly."""
    whole = math.ceil(n_bytes)
    step: int = max(1, 10 ** (len(str(whole)) - 3))
    return -(-whole // step) * step


def format_count(count: float) -> str:
    """Format a count as 16.4B, 360M or 12.3K."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= factor * 0.9995:
            return f"{count / factor:.4g}{suffix}" if factor == 1e12 else f"{count / factor:.3g}{suffix}"
    return f"{count:.0f}"
