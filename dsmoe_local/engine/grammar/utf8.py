"""Ranges of characters as ranges of UTF-8 bytes. Nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

ByteRanges: TypeAlias = tuple[tuple[int, int], ...]

_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)


def byte_ranges(low: int, high: int) -> Iterator[ByteRanges]:
    """Sequences of byte ranges that together stand for the characters from `low` to `high`, no surrogates."""
    for last in _LAST_OF_LENGTH:
        if low > high:
            return
        if low <= last:
            yield from _of_one_length(chr(low).encode(), chr(min(high, last)).encode())
            low = last + 1


def _of_one_length(low: bytes, high: bytes) -> Iterator[ByteRanges]:
    if len(low) == 1:
        yield ((low[0], high[0]),)
        return
    rest = len(low) - 1
    if low[0] == high[0]:
        yield from _behind(low[0], _of_one_length(low[1:], high[1:]))
        return
    first, last = low[0], high[0]
    if low[1:] != b"\x80" * rest:
        yield from _behind(first, _of_one_length(low[1:], b"\xbf" * rest))
        first += 1
    if high[1:] != b"\xbf" * rest:
        last -= 1
    if first <= last:
        yield ((first, last), *((0x80, 0xBF),) * rest)
    if last < high[0]:
        yield from _behind(high[0], _of_one_length(b"\x80" * rest, high[1:]))


def _behind(first: int, tails: Iterator[ByteRanges]) -> Iterator[ByteRanges]:
    for tail in tails:
        yield ((first, first), *tail)
