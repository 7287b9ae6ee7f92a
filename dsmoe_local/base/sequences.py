"""What two sequences have in common."""

from __future__ import annotations

from collections.abc import Sequence


def n_common(first: Sequence[object], second: Sequence[object]) -> int:
    """The length of the longest beginning that both have."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    # Of another kind, a list and a tuple, equal ones differ.
    return next((index for index in range(most) if first[index] != second[index]), most)
