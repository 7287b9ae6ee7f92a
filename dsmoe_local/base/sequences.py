"""Common prefixes of sequences, and runs of consecutive numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby


def n_common(first: Sequence[object], second: Sequence[object]) -> int:
    """Return the length of the longest common prefix."""
    most = min(len(first), len(second))
    if first[:most] == second[:most]:
        return most
    # A list and a tuple with equal items are not equal.
    return next((index for index in range(most) if first[index] != second[index]), most)


def runs(ascending: Iterable[int]) -> list[range]:
    """Return the runs of consecutive numbers: 1, 2, 3 and 7 as 1-3 and 7."""
    found = []
    for _, run in groupby(enumerate(ascending), key=lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        found.append(range(numbers[0], numbers[-1] + 1))
    return found
