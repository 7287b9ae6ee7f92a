"""Leaves made into blocks: marks of lists and quotes, gaps, lines of code."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

from rich.cells import cell_len

from dsmoe_local.chat.markdown.blocks import Block, Kind, Span, Spans
from dsmoe_local.chat.markdown.highlight import Highlighter, knows_language
from dsmoe_local.chat.markdown.leaves import Container, Leaf, LeafKind

QUOTE_MARK = "│ "
_BULLETS = "•◦▪"
_CODE = (LeafKind.FENCE, LeafKind.INDENTED)
_APART = (*_CODE, LeafKind.TABLE, LeafKind.RULE)
"""These have a line to themselves on both sides; a heading above only."""


@dataclass(slots=True)
class Composer:
    """Makes blocks in the order of the document.

    A block of code may be given in parts, one after another: the later parts hold what is new only.
    """

    highlight: bool = True
    _kind: LeafKind | None = None  # of the leaf before
    _path: tuple[Container, ...] = ()
    _code: Highlighter | None = None  # while a block of code is given in parts

    def copy(self) -> Composer:
        """One that goes on from the same place."""
        other = copy(self)
        other._code = self._code and self._code.copy()
        return other

    def blocks(self, leaf: Leaf, *, gap: bool, more: bool = False) -> list[Block]:
        """The blocks of a leaf. `gap`: the source has an empty line above it. `more`: this is a part of a
        block of code, others follow.
        """
        blocks: list[Block] = []
        if self._code is None:
            above = self._gap(leaf, gap)
            if leaf.kind in _CODE:
                blocks += self._begin_code(leaf, above)
            else:
                lead, hang = _margins(leaf.path)
                blocks.append(
                    Block(
                        _BLOCKS[leaf.kind],
                        leaf.content,
                        leaf.level,
                        leaf.rows,
                        leaf.aligned,
                        lead=lead,
                        hang=hang,
                        gap=above,
                    )
                )
        elif leaf.kind in _CODE:
            blocks += self._code_lines(leaf, None)
        if not more:
            self._code = None
        self._kind, self._path = leaf.kind, leaf.path
        return blocks

    def _begin_code(self, leaf: Leaf, gap: str | None) -> list[Block]:
        blocks: list[Block] = []
        language, *_ = leaf.info.split() or [""]
        self._code = Highlighter(language if self.highlight else "")
        if not all(container.begun for container in leaf.path):
            lead, hang = _margins(leaf.path)
            blocks.append(Block(Kind.TEXT, lead=lead, hang=hang, gap=gap))
            gap = None
        if leaf.info and not (leaf.info == language and knows_language(language)):
            blocks.append(Block(Kind.CODE, spans=(("comment", leaf.info),), gap=gap))
            gap = None
        return blocks + self._code_lines(leaf, gap)

    def _code_lines(self, leaf: Leaf, gap: str | None) -> list[Block]:
        """Code stands at the left edge, also in lists, so that copying gives it back as it was written."""
        assert self._code is not None
        lines = leaf.content.removesuffix("\n").split("\n") if leaf.content else []
        return [
            Block(Kind.CODE, line, spans=self._code.line(line), gap=None if number else gap)
            for number, line in enumerate(lines)
        ]

    def _gap(self, leaf: Leaf, gap: bool) -> str | None:
        if self._kind is None:
            return None
        if not gap and self._kind not in _APART and leaf.kind not in (*_APART, LeafKind.HEADING):
            return None
        marks = ""
        for before, now in zip(self._path, leaf.path, strict=False):
            if before.key != now.key:
                break
            marks += QUOTE_MARK if now.quote else " " * cell_len(_mark(now, 0))
        return marks.rstrip()


_BLOCKS = {
    LeafKind.PARAGRAPH: Kind.TEXT,
    LeafKind.EMPTY: Kind.TEXT,
    LeafKind.HEADING: Kind.HEADING,
    LeafKind.TABLE: Kind.TABLE,
    LeafKind.RULE: Kind.RULE,
}


def _margins(path: tuple[Container, ...]) -> tuple[Spans, Spans]:
    """What stands before the first line of a leaf, and before its others."""
    lead: list[Span] = []
    hang: list[Span] = []
    depth = 0
    for container in path:
        if container.quote:
            lead.append(("quote", QUOTE_MARK))
            hang.append(("quote", QUOTE_MARK))
            continue
        mark = _mark(container, depth)
        space = " " * cell_len(mark)
        depth += container.number is None
        lead.append(("", space) if container.begun else ("mark", mark))
        hang.append(("", space))
    return tuple(lead), tuple(hang)


def _mark(container: Container, depth: int) -> str:
    if container.number is None:
        return f"{_BULLETS[min(depth, len(_BULLETS) - 1)]} "
    return f"{container.number}{container.marker[-1]} "
