"""Markdown blocks as lines of styled text: headings, lists, quotes, tables, code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from markdown_it.rules_block.table import escapedSplit
from markdown_it.token import Token
from rich.align import AlignMethod
from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from dsmoe_local.chat.cells import most_cells
from dsmoe_local.chat.markdown.code import code_header, highlight, language_of
from dsmoe_local.chat.markdown.text import PLAIN, inline_text, wrap

_BULLETS = "•◦▪"
_QUOTE_MARK = "│ "
_DIM, _BOLD = Style(dim=True), Style(bold=True)
_TITLE = Style(bold=True, underline=True)
_MARK = Style(color="cyan")
_LONGEST_RULE = 40
_LEAST_WIDTH = 10  # of text beside the marks of lists and quotes
_LEAST_COLUMN = 6  # cells of a table's column, if its content is that wide
_BETWEEN_COLUMNS = 2
_NEW_LINE = re.compile(r"<br\s*/?>", re.IGNORECASE)
_ALIGNMENTS: dict[object, AlignMethod] = {
    None: "left",
    "text-align:left": "left",
    "text-align:center": "center",
    "text-align:right": "right",
}

_CODE = ("fence", "code_block")
_APART = (*_CODE, "table_open", "hr")  # always between blank lines
_LEAVES = ("paragraph_open", "heading_open", *_APART)


@dataclass(slots=True)
class _Container:
    """A quote or a list item. `mark` stands before its first line; `begun`: that line is rendered."""

    mark: str
    line: int
    quote: bool = False
    begun: bool = False

    @property
    def margin(self) -> str:
        """What stands before its later lines."""
        return self.mark if self.quote else " " * cell_len(self.mark)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A block that holds text, in the quotes and list items of `path`; or an empty list item."""

    type: str  # of its first token; empty for an empty list item
    path: tuple[_Container, ...]
    start: int  # lines of source
    end: int
    index: int = 0  # of its first token


@dataclass(slots=True)
class Renderer:
    """Renders the blocks of a document in order. Keeps what the blank lines between them depend on."""

    colour: bool
    above: str | None = None  # token type of the last block; None: there is none
    blank: bool = False  # whether the source has a blank line after that block

    def render(
        self, tokens: Sequence[Token], source: Sequence[str], width: int, *, number: int | None, fold: bool
    ) -> Iterator[Text]:
        """Yield the lines of blocks, given their tokens and source.

        `number` is that of the first list item, if earlier items of its list are rendered already. Code and,
        without `fold`, long words may be wider than `width`.
        """
        before: tuple[_Container, ...] = ()
        end = 0
        for leaf in _leaves(tokens, number):
            top = min([leaf.start, *(container.line for container in leaf.path if not container.begun)])
            self.blank |= any(map(is_blank, source[end:top]))
            if self.needs_gap(leaf.type):
                yield Text(_common_margin(before, leaf.path), _DIM)
            yield from self._leaf(leaf, tokens[leaf.index :], source, width, fold=fold)
            for container in leaf.path:
                container.begun = True
            before, end = leaf.path, leaf.end
            self.above, self.blank = leaf.type, False
        self.blank |= any(map(is_blank, source[end:]))

    def needs_gap(self, token_type: str) -> bool:
        """Return whether a blank line comes before a block of this type."""
        apart = self.above in _APART or token_type in (*_APART, "heading_open")
        return self.above is not None and (self.blank or apart)

    def _leaf(
        self, leaf: _Leaf, tokens: Sequence[Token], source: Sequence[str], width: int, *, fold: bool
    ) -> Iterator[Text]:
        if leaf.type in _CODE:
            # Code starts at the left edge even in a list, so that it can be copied from the terminal.
            if not all(container.begun for container in leaf.path):
                yield _with_margins([Text()], leaf.path)[0]
            yield from self._code(tokens[0])
            return
        width = max(width - cell_len("".join(c.margin for c in leaf.path)), min(width, _LEAST_WIDTH))
        yield from _with_margins(_lines(tokens, leaf.type, source, width, fold=fold), leaf.path)

    def _code(self, token: Token) -> Iterator[Text]:
        yield from code_header(token.info)
        lines = token.content.removesuffix("\n").split("\n") if token.content else []
        yield from highlight(lines, language_of(token.info) if self.colour else "")


def is_blank(line: str) -> bool:
    """Return whether a line of source has nothing but spaces and the marks of quotes."""
    return not line.strip(" \t>")


def _leaves(tokens: Sequence[Token], number: int | None) -> Iterator[_Leaf]:
    path: list[_Container] = []
    numbers: list[int | None] = []  # of the next item of each open list; None: bullets
    for index, token in enumerate(tokens):
        start, end = token.map or (0, 0)
        match token.type:
            case "ordered_list_open":
                numbers.append(int(token.attrs.get("start", 1)) if number is None else number)
            case "bullet_list_open":
                numbers.append(None)
            case "ordered_list_close" | "bullet_list_close":
                numbers.pop()
            case "blockquote_open":
                path.append(_Container(_QUOTE_MARK, start, quote=True))
            case "list_item_open":
                path.append(_Container(_item_mark(numbers, token.markup), start))
                number = None
            case "blockquote_close" | "list_item_close":
                if not path[-1].begun and not path[-1].quote:
                    yield _Leaf("", tuple(path), path[-1].line, path[-1].line + 1)
                path.pop()
            case kind if kind in _LEAVES:
                yield _Leaf(kind, tuple(path), start, end, index)


def _item_mark(numbers: list[int | None], markup: str) -> str:
    if (number := numbers[-1]) is not None:
        numbers[-1] = number + 1
        return f"{number}{markup} "
    return f"{_BULLETS[min(numbers.count(None), len(_BULLETS)) - 1]} "


def _common_margin(before: Sequence[_Container], path: Sequence[_Container]) -> str:
    margin = ""
    for container, other in zip(before, path, strict=False):
        if container is not other:
            break
        margin += container.margin
    return margin.rstrip()


def _with_margins(lines: list[Text], path: Sequence[_Container]) -> list[Text]:
    first, others = Text(), Text()
    for container in path:
        style = _DIM if container.quote else _MARK
        first.append(container.margin if container.begun else container.mark, style)
        others.append(container.margin, style)
    joined = [Text.assemble(others if number else first, line) for number, line in enumerate(lines)]
    for line in joined:
        line.rstrip()
    return joined


def _lines(
    tokens: Sequence[Token], kind: str, source: Sequence[str], width: int, *, fold: bool
) -> list[Text]:
    match kind:
        case "paragraph_open":
            return wrap(inline_text(tokens[1].content), width, fold=fold)
        case "heading_open":
            style = _TITLE if tokens[0].tag == "h1" else _BOLD
            return wrap(inline_text(tokens[1].content, style), width, fold=fold)
        case "table_open":
            return _table(tokens, source, width)
        case "hr":
            return [Text("─" * min(width, _LONGEST_RULE), _DIM)]
    return [Text()]


def _table(tokens: Sequence[Token], source: Sequence[str], width: int) -> list[Text]:
    rows: list[list[Text]] = []
    aligned: list[AlignMethod] = []
    line = 0
    for token in tokens:
        if token.type == "table_close":
            break
        if token.type == "tr_open":
            rows.append([])
            line = (token.map or [0])[0]
        elif token.type == "th_open":
            aligned.append(_ALIGNMENTS[token.attrs.get("style")])
        elif token.type == "inline":
            content = _NEW_LINE.sub("\n", token.content)
            rows[-1].append(inline_text(content, PLAIN if rows[1:] else _BOLD))
        elif token.type == "tr_close":
            # The parser drops cells beyond the last column. They are appended to the last cell.
            cells = [cell.strip() for cell in escapedSplit(source[line].lstrip(" \t>").rstrip())]
            for cell in filter(None, cells[len(rows[-1]) + (cells[0] == "") :]):
                rows[-1][-1].append_text(inline_text(f" | {cell}"))
    wanted = [max(map(_longest_line, column)) for column in zip(*rows, strict=True)]
    room = width - _BETWEEN_COLUMNS * (len(wanted) - 1)
    if sum(min(cells, _LEAST_COLUMN) for cells in wanted) > room:
        return _records(rows, width)
    return list(_columns(rows, _column_widths(wanted, room), aligned))


def _column_widths(wanted: Sequence[int], room: int) -> list[int]:
    """Return widths that take at most `room` cells. The widest columns give up most."""
    most = max(wanted)
    while sum(min(cells, most) for cells in wanted) > room:
        most -= 1
    widths = [min(cells, most) for cells in wanted]
    for column, cells in enumerate(wanted):
        widths[column] += cells > most and sum(widths) < room
    return widths


def _columns(rows: list[list[Text]], widths: Sequence[int], aligned: Sequence[AlignMethod]) -> Iterator[Text]:
    wrapped = [
        [wrap(cell, cells, fold=True) for cell, cells in zip(row, widths, strict=True)] for row in rows
    ]
    rule = Text("─" * (sum(widths) + _BETWEEN_COLUMNS * (len(widths) - 1)), _DIM)
    rules = any(len(lines) > 1 for row in wrapped[1:] for lines in row)  # between all rows
    for number, row in enumerate(wrapped):
        if number == 1 or (number and rules):
            yield rule
        for cells in zip_longest(*row, fillvalue=Text()):
            line = Text()
            for cell, width, align in zip(cells, widths, aligned, strict=True):
                cell = cell.copy()
                cell.align(align, width)
                line.append_text(cell).append(" " * _BETWEEN_COLUMNS)
            line.rstrip()
            yield line
    if len(wrapped) == 1:
        yield rule


def _records(rows: list[list[Text]], width: int) -> list[Text]:
    """Return the rows of a table that is too wide, with each cell on a line of its own."""
    lines: list[Text] = []
    for row in rows[1:] or [[Text() for _ in rows[0]]]:
        if lines:
            lines.append(Text("─" * width, _DIM))
        for name, cell in zip(rows[0], row, strict=True):
            colon = Text(": " if name else "", _BOLD)
            lines += wrap(Text.assemble(name, colon, cell), width, fold=True)
    return lines


def _longest_line(text: Text) -> int:
    return max(1, *map(most_cells, text.plain.split("\n")))
