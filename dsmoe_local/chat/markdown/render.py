"""Blocks of Markdown drawn for a terminal, as lines with ANSI styles."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.text import Text

from dsmoe_local.chat.markdown.blocks import Block, Kind, Spans
from dsmoe_local.chat.markdown.inline import inline_spans
from dsmoe_local.chat.markdown.stream import MarkdownStream, Open
from dsmoe_local.chat.markdown.table import table_lines
from dsmoe_local.chat.markdown.theme import ansi, style
from dsmoe_local.chat.markdown.wrap import Line, fold, width_of, wrap

_NARROWEST = 10
_LONGEST_RULE = 40
_RULE = "─"


def render_ansi(block: Block, width: int, *, colour: bool) -> str:
    """A final block as it is printed, its last newline included.

    Lines are at most `width` cells wide, but for code and words that are longer: these are left to the
    terminal, so that they can be copied whole.
    """
    return "".join(f"{ansi(line, colour=colour)}\n" for line in _lines(block, width, whole=True))


def render_open(part: Open, width: int, height: int, *, colour: bool) -> str:
    """The last `height` lines of what is open, none wider than `width` cells, without a last newline.

    The cost depends on the size of the window, not on the length of the reply.
    """
    width, height = max(width, 1), max(height, 1)
    lines: list[Line] = []
    for block in reversed(part.blocks(width * height)):
        lines[:0] = [row for line in _lines(block, width, whole=False) for row in fold(line, width)]
        if len(lines) >= height:
            break
    return "\n".join(ansi(line, colour=colour) for line in lines[-height:])


def render_text(source: str, width: int, *, colour: bool) -> Text:
    """A whole text at once, for Rich."""
    text = Text()
    for block in _blocks(source, colour=colour):
        for line in _lines(block, width, whole=True):
            for names, part in line:
                text.append(part, style(names, colour=colour))
            text.append("\n")
    text.rstrip()
    return text


def render_markdown(source: str, width: int, *, colour: bool) -> str:
    """A whole text at once: the same characters as its stream."""
    return "".join(render_ansi(block, width, colour=colour) for block in _blocks(source, colour=colour))


def _blocks(source: str, *, colour: bool) -> tuple[Block, ...]:
    stream = MarkdownStream(highlight=colour)
    return (*stream.feed(source), *stream.finish())


def _lines(block: Block, width: int, *, whole: bool) -> list[Line]:
    """The lines of a block, its margins included. `whole`: long words are not broken."""
    inner = max(width - width_of(block.hang), min(width, _NARROWEST))
    lines = _DRAW[block.kind](block, inner, whole) or [[]]
    gap: list[Line] = [] if block.gap is None else [[("quote", block.gap)]]
    if block.kind is Kind.CODE:
        return [*gap, *lines]
    margins = (block.lead, *[block.hang] * (len(lines) - 1))
    return [*gap, *(_trimmed([*margin, *line]) for margin, line in zip(margins, lines, strict=True))]


def _trimmed(line: Line) -> Line:
    while line and not line[-1][1].rstrip(" "):
        line.pop()
    if line:
        style, text = line[-1]
        line[-1] = (style, text.rstrip(" "))
    return line


def _text(block: Block, width: int, whole: bool) -> list[Line]:
    return wrap(inline_spans(block.source), width, fold=not whole)


def _heading(block: Block, width: int, whole: bool) -> list[Line]:
    spans: Spans = inline_spans(block.source, "title" if block.level == 1 else "heading")
    return wrap(spans, width, fold=not whole)


def _code(block: Block, width: int, whole: bool) -> list[Line]:
    return [list(block.spans)]


def _table(block: Block, width: int, whole: bool) -> list[Line]:
    return list(table_lines(block, width))


def _rule(block: Block, width: int, whole: bool) -> list[Line]:
    return [[("rule", _RULE * min(width, _LONGEST_RULE))]]


_DRAW: Mapping[Kind, Callable[[Block, int, bool], list[Line]]] = {
    Kind.TEXT: _text,
    Kind.HEADING: _heading,
    Kind.CODE: _code,
    Kind.TABLE: _table,
    Kind.RULE: _rule,
}
