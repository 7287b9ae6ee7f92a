"""Source lines read as leaves: the blocks that hold text, each with the lists and quotes that it is in.

A document is a sequence of leaves, of which only the last can still change. So what stands before it need not
be read again: a `Context` keeps the lists and quotes that are open, one line of source stands for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count

from markdown_it.rules_block.table import escapedSplit
from markdown_it.token import Token

from dsmoe_local.chat.markdown.parser import parse_blocks

_STAND_IN = "# _"
"""A block that ends with its line, so that nothing behind it can become a part of it."""

_MOST_BEHIND_MARKER = 4
"""Spaces; if there are more, they belong to the content."""


_QUOTES = re.compile(r"^.*> ?")


class LeafKind(StrEnum):
    """What a leaf is. EMPTY is an item of a list without any."""

    PARAGRAPH = "paragraph"
    HEADING = "heading"
    FENCE = "fence"
    INDENTED = "indented"
    TABLE = "table"
    RULE = "rule"
    EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Container:
    """A quote, or an item of a list: `marker` as it was written, `number` in an ordered list, `indent` of its
    content in columns. `key` tells containers apart. `sibling` is the item before in the same list. `begun`:
    a leaf of it is printed.
    """

    key: int
    line: int
    marker: str = ""
    number: int | None = None
    indent: int = 0
    sibling: Container | None = None
    begun: bool = False

    @property
    def quote(self) -> bool:
        """Whether it is a quote."""
        return not self.marker


@dataclass(frozen=True, slots=True)
class Leaf:
    """A block without blocks in it, on lines `start` to `end` (not included) of what was read.

    `content`: its source without the marks of the block; `level` of a heading, `info` of a fence and whether
    it is `closed`; `rows` of a table, the header first.
    """

    kind: LeafKind
    path: tuple[Container, ...]
    start: int
    end: int
    content: str = ""
    level: int = 0
    info: str = ""
    closed: bool = False
    rows: tuple[tuple[str, ...], ...] = ()
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Context:
    """Where in the document the lines are that come next: in `before`, which began on lines that are gone,
    and, if they begin with a leaf that was read already, in `after`, which begin with that leaf.
    """

    before: tuple[Container, ...] = ()
    after: tuple[Container, ...] = ()

    @staticmethod
    def of(leaf: Leaf) -> Context:
        """The context for going on with a leaf, from its first line."""
        n_before = sum(container.line < leaf.start for container in leaf.path)
        before, after = leaf.path[:n_before], leaf.path[n_before:]
        if after and after[0].sibling is not None:
            before += (after[0].sibling,)
        return Context(before, after)

    @property
    def stand_in(self) -> list[str]:
        """Source that opens the containers of `before`, a line for each."""
        lines, margin, column = [], "", 0
        for container in self.before:
            if container.quote:
                margin, column = f"{margin}> ", 0
                lines.append(margin + _STAND_IN)
                continue
            spaces = container.indent - column - len(container.marker)
            lead = max(0, spaces - _MOST_BEHIND_MARKER)
            lines.append(f"{margin}{' ' * lead}{container.marker}{' ' * (spaces - lead)}{_STAND_IN}")
            margin, column = margin + " " * (container.indent - column), container.indent
        return lines


def read_leaves(lines: Sequence[str], context: Context) -> list[Leaf]:
    """The leaves of `lines`, which follow on `context`. Line numbers count from the first of `lines`."""
    stand_in = context.stand_in
    tokens, indents = parse_blocks("".join(f"{line}\n" for line in (*stand_in, *lines)))
    return list(_Walk(tokens, indents, lines, context, len(stand_in)).leaves())


@dataclass(frozen=True, slots=True)
class _List:
    """A list that is open: the number of the next item, and the item before."""

    number: int
    item: Container | None = None


@dataclass(slots=True)
class _Walk:
    """Goes through the tokens once and keeps track of the containers."""

    tokens: list[Token]
    indents: dict[tuple[int, int], int]
    lines: Sequence[str]
    context: Context
    n_stand_in: int
    path: list[Container] = field(default_factory=list)
    lists: list[_List] = field(default_factory=list)
    keys: Iterator[int] = field(init=False)
    known: list[Container] = field(init=False)  # those of the context that were not met yet

    def __post_init__(self) -> None:
        self.known = [*self.context.before, *self.context.after]
        self.keys = count(max((container.key for container in self.known), default=-1) + 1)

    def leaves(self) -> Iterator[Leaf]:
        for place, token in enumerate(self.tokens):
            if token.type in ("blockquote_open", "list_item_open"):
                self._enter(token, place)
            elif token.type in ("bullet_list_open", "ordered_list_open"):
                start = token.attrGet("start")
                self.lists.append(_List(1 if start is None else int(start)))
            elif token.type in ("bullet_list_close", "ordered_list_close"):
                self.lists.pop()
            elif token.type in ("list_item_close", "blockquote_close"):
                yield from self._leave()
            elif (leaf := self._read(token, place)) is not None:
                yield from self._leaf(leaf)

    def _enter(self, token: Token, place: int) -> None:
        line = _lines_of(token)[0] - self.n_stand_in
        quote = token.type == "blockquote_open"
        marker = "" if quote else token.info + token.markup
        if self.known and self.known[0].quote is quote:
            known = self.known.pop(0)
            container = replace(known, line=line, indent=self._indent(place, line))
        elif quote:
            container = Container(next(self.keys), line)
        else:
            number = self.lists[-1].number if token.info else None
            indent = self._indent(place, line)
            container = Container(next(self.keys), line, marker, number, indent, self.lists[-1].item)
        if not quote:
            self.lists[-1] = _List((container.number or 0) + 1, replace(container, sibling=None))
        self.path.append(container)

    def _indent(self, place: int, line: int) -> int:
        """The indent of the content of the item that begins at `place`."""
        first = self.tokens[place + 1]
        if first.map:
            return self.indents[first.level, first.map[0]]
        # It is empty: a space behind its marker, which ends the line.
        return len(_QUOTES.sub("", self.lines[line]).expandtabs(4).rstrip()) + 1

    def _leave(self) -> Iterator[Leaf]:
        container = self.path[-1]
        if not container.quote and not container.begun and container.line >= 0:
            yield from self._leaf(Leaf(LeafKind.EMPTY, (), container.line, container.line + 1))
        self.path.pop()

    def _leaf(self, leaf: Leaf) -> Iterator[Leaf]:
        if leaf.start < 0:
            return
        yield replace(leaf, path=tuple(self.path))
        self.path = [replace(container, begun=True) for container in self.path]

    def _read(self, token: Token, place: int) -> Leaf | None:
        if token.type not in _KINDS or token.map is None:
            return None
        start, end = (line - self.n_stand_in for line in token.map)
        leaf = Leaf(_KINDS[token.type], (), start, end)
        if start < 0:
            return leaf
        match leaf.kind:
            case LeafKind.PARAGRAPH:
                return replace(leaf, content=self.tokens[place + 1].content)
            case LeafKind.HEADING:
                return replace(leaf, content=self.tokens[place + 1].content, level=int(token.tag[1:]))
            case LeafKind.FENCE:
                closed = end - start - 1 > token.content.count("\n")
                return replace(leaf, content=token.content, info=token.info.strip(), closed=closed)
            case LeafKind.INDENTED:
                return replace(leaf, content=token.content)
            case LeafKind.TABLE:
                return self._table(leaf, place)
        return leaf

    def _table(self, leaf: Leaf, place: int) -> Leaf:
        rows: list[list[str]] = []
        aligned: list[str] = []
        line = 0
        for token in self.tokens[place:]:
            if token.type == "table_close":
                break
            if token.type == "tr_open":
                rows.append([])
                line = _lines_of(token)[0] - self.n_stand_in
            elif token.type == "th_open":
                aligned.append(str(token.attrGet("style") or "").removeprefix("text-align:"))
            elif token.type == "inline":
                rows[-1].append(token.content)
            elif token.type == "tr_close":
                self._keep_excess(rows[-1], line)
        return replace(leaf, rows=tuple(map(tuple, rows)), aligned=tuple(aligned))

    def _keep_excess(self, row: list[str], line: int) -> None:
        """The parser drops the cells for which there is no column: they stay, in the last one."""
        cells = [cell.strip() for cell in escapedSplit(self.lines[line].lstrip(" \t>").rstrip())]
        if cells[0] == "":
            del cells[0]
        excess = " | ".join(filter(None, cells[len(row) :]))
        if excess:
            row[-1] = f"{row[-1]} | {excess}"


_KINDS = {
    "paragraph_open": LeafKind.PARAGRAPH,
    "heading_open": LeafKind.HEADING,
    "fence": LeafKind.FENCE,
    "code_block": LeafKind.INDENTED,
    "table_open": LeafKind.TABLE,
    "hr": LeafKind.RULE,
}


def _lines_of(token: Token) -> list[int]:
    return token.map or [0, 0]
