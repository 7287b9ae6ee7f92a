"""The syntax tree of a grammar: rules of nested nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

MAX_CHARACTER = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class Characters:
    """One character in `ranges`, which are ascending, disjoint and without surrogates (see `characters`)."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """These characters in sequence."""

    text: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """All items in their order. Without items: the empty text."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the items."""

    items: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The item `low` to `high` times. None: without limit."""

    item: Node
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Rule:
    """A reference to the rule with that name."""

    name: str


Node: TypeAlias = Characters | Text | Sequence | Choice | Repeat | Rule

NOTHING = Sequence(())


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules by name. A text matches the grammar if it matches `root`."""

    rules: dict[str, Node]
    root: str = "root"


def characters(ranges: Iterable[tuple[int, int]], *, negated: bool = False) -> Characters:
    """Return the characters in the ranges, or all others if `negated`. Surrogates are removed."""
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
