"""The common prefix of two sequences."""

from __future__ import annotations

from collections.abc import Sequence


def n_common(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the longest common prefix."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    # A list and a tuple with equal items are not equal.
    return next((index for index in range(most) if first[index] != second[index]), most)
