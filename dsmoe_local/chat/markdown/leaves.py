"""Source lines read as leaves: the blocks that hold text, each with the lists and quotes that it is in.

A document is a sequence of leaves, of which only the last can still change. So what stands before it need not
be read again: a `Context` keeps the lists and quotes that are open, one line of source stands for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count

from markdown_it.rules_block.table import escapedSplit
from markdown_it.token import Token

from dsmoe_local.chat.markdown.parser import parse_blocks

_STAND_IN = "# _"
"""A block that ends with its line, so that nothing behind it can become a part of it."""

_MOST_BEFORE_MARKER = 3
_MOST_BEHIND_MARKER = 4


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
    content in columns. `key` tells containers apart. `begun`: a leaf of it is printed.
    """

    key: int
    line: int
    marker: str = ""
    number: int | None = None
    indent: int = 0
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
    """Where in the document the lines are that come next: inside of `path`, of whose containers the first
    `n_before` began on lines that are gone.
    """

    path: tuple[Container, ...] = ()
    n_before: int = 0

    @property
    def stand_in(self) -> list[str]:
        """The source that opens the containers which began before; at most one line."""
        if not self.n_before:
            return []
        line, column = "", 0
        for container in self.path[: self.n_before]:
            if container.quote:
                line, column = f"{line}> ", 0
                continue
            spaces = container.indent - column - len(container.marker)
            lead = max(0, spaces - _MOST_BEHIND_MARKER)
            line += " " * lead + container.marker + " " * (spaces - lead)
            column = container.indent
        return [line + _STAND_IN]


def read_leaves(lines: Sequence[str], context: Context) -> list[Leaf]:
    """The leaves of `lines`, which follow on `context`. Line numbers count from the first of `lines`."""
    stand_in = context.stand_in
    tokens, indents = parse_blocks("".join(f"{line}\n" for line in (*stand_in, *lines)))
    return list(_Walk(tokens, indents, lines, context, len(stand_in)).leaves())


@dataclass(slots=True)
class _Walk:
    """Goes through the tokens once and keeps track of the containers."""

    tokens: list[Token]
    indents: dict[tuple[int, int], int]
    lines: Sequence[str]
    context: Context
    n_stand_in: int
    path: list[Container] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the item before, for each list that is open
    keys: Iterator[int] = field(init=False)
    known: list[Container] = field(init=False)  # those of the context that were not met yet

    def __post_init__(self) -> None:
        self.known = list(self.context.path)
        self.keys = count(max((container.key for container in self.known), default=-1) + 1)

    def leaves(self) -> Iterator[Leaf]:
        for place, token in enumerate(self.tokens):
            if token.type == "blockquote_open":
                self._enter(token, place)
            elif token.type in ("bullet_list_open", "ordered_list_open"):
                start = token.attrGet("start")
                self.numbers.append(0 if start is None else int(start) - 1)
            elif token.type in ("bullet_list_close", "ordered_list_close"):
                self.numbers.pop()
            elif token.type == "list_item_open":
                self.numbers[-1] += 1
                self._enter(token, place)
            elif token.type in ("list_item_close", "blockquote_close"):
                yield from self._leave()
            elif (leaf := self._read(token, place)) is not None:
                yield from self._leaf(leaf)

    def _enter(self, token: Token, place: int) -> None:
        line = _lines_of(token)[0] - self.n_stand_in
        first = self.tokens[place + 1]
        indent = self.indents[first.level, _lines_of(first)[0]] if first.map else 0
        if self.known:
            container = replace(self.known.pop(0), line=line, indent=indent)
            if container.number is not None:
                self.numbers[-1] = container.number
        elif token.type == "blockquote_open":
            container = Container(next(self.keys), line)
        else:
            number = self.numbers[-1] if token.info else None
            container = Container(next(self.keys), line, token.info + token.markup, number, indent)
        self.path.append(container)

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
