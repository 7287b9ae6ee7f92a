"""The blocks that a reply is drawn from. Plain data: `stream` makes them, `render` draws them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

Span: TypeAlias = tuple[str, str]
"""The names of its styles, separated by spaces (`theme` has them), and text."""

Spans: TypeAlias = tuple[Span, ...]


class Kind(StrEnum):
    """What a block is."""

    TEXT = "text"
    HEADING = "heading"
    CODE = "code"
    TABLE = "table"
    RULE = "rule"


@dataclass(frozen=True, slots=True)
class Block:
    """Something that is drawn as it stands and never changes again.

    `source` is Markdown without the marks of the block itself; of code, one line of it exactly, whose
    highlighting are `spans`. `lead` stands before its first line and `hang` before the others: the marks of
    the lists and quotes that it is in. `gap` is the line above it: None is none, and it may hold the marks of
    quotes.
    """

    kind: Kind
    source: str = ""
    level: int = 0
    rows: tuple[tuple[str, ...], ...] = ()
    aligned: tuple[str, ...] = ()
    spans: Spans = ()
    lead: Spans = ()
    hang: Spans = ()
    gap: str | None = None
