"""What a grammar is made of: rules of nested nodes. Data only: read, written and matched elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

MAX_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class Characters:
    """One character of the ranges, which are ascending, apart, and free of surrogates: see `characters`."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """These characters, one after another."""

    text: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """All of the items in their order; none of them: nothing."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the items."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The item, `low` to `high` times; None: without end."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Rule:
    """What the rule of that name stands for."""

    name: str


Node: TypeAlias = Characters | Text | Sequence | Choice | Repeat | Rule

NOTHING = Sequence(())


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules by name; a text belongs to it if it is a `root`."""

    rules: dict[str, Node]
    root: str = "root"


def characters(ranges: Iterable[tuple[int, int]], *, negated: bool = False) -> Characters:
    """Ranges in any order, or all characters but theirs. Surrogates are no characters and left out."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if low > high:
            continue
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    if negated:
        ends = [-1, *(high for _, high in merged)]
        starts = [*(low for low, _ in merged), MAX_CHARACTER + 1]
        merged = [(end + 1, start - 1) for end, start in zip(ends, starts, strict=True) if end + 1 < start]
    first, last = _SURROGATES
    apart = [
        piece for low, high in merged for piece in ((low, min(high, first - 1)), (max(low, last + 1), high))
    ]
    return Characters(tuple((low, high) for low, high in apart if low <= high))
