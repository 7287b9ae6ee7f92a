"""Common prefixes of sequences, and runs of consecutive numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

_Items = TypeVar("_Items", list[Any], tuple[Any, ...])


def n_common(first: _Items, second: _Items, start: int = 0, most: int | None = None) -> int:
    """Return the length of the longest common prefix of `first` and `second[start:most]`."""
    end = min(len(first), (len(second) if most is None else most) - start)
    low, step = 0, 32
    # Comparing slices is fast. Double the step while they are equal, then bisect.
    while low < end and first[low : low + step] == second[start + low : start + low + step]:
        low, step = low + step, step * 2
    high = min(end, low + step)
    low = min(low, end)
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[start + low : start + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def runs(ascending: Iterable[int]) -> list[range]:
    """Return the runs of consecutive numbers: 1, 2, 3 and 7 as 1-3 and 7."""
    found: list[range] = []
    for number in ascending:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found
