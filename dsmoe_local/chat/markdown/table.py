"""Tables: columns that fit the width, or, where there are too many of them, a list of their rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len

from dsmoe_local.chat.markdown.blocks import Block, Spans
from dsmoe_local.chat.markdown.inline import inline_spans
from dsmoe_local.chat.markdown.wrap import Line, longest_word, width_of, wrap

_BETWEEN = 2
_NARROWEST = 6
"""Cells of a column that are needed to read it, if it holds as much."""

_NEW_LINE = re.compile(r"<br\s*/?>", re.IGNORECASE)
_RULE = "─"


def table_lines(block: Block, width: int) -> Iterator[Line]:
    """The lines of a table, without its margins."""
    rows = [
        [inline_spans(_NEW_LINE.sub("\n", cell), "" if number else "header") for cell in row]
        for number, row in enumerate(block.rows)
    ]
    widths = _widths(rows, width)
    if widths is None:
        yield from _records(rows, width)
    else:
        yield from _columns(rows, widths, block.aligned)


def _widths(rows: Sequence[Sequence[Spans]], width: int) -> list[int] | None:
    """The width of each column; None if there is no room for all."""
    columns = list(zip(*rows, strict=True))
    wanted = [max(1, *map(width_of, column)) for column in columns]
    free = width - _BETWEEN * (len(columns) - 1)
    if sum(wanted) <= free:
        return wanted
    # Words stay whole where that is possible.
    words = [max(1, *map(longest_word, column)) for column in columns]
    least = [max(min(_NARROWEST, want), word) for want, word in zip(wanted, words, strict=True)]
    if sum(least) > free:
        least = [min(_NARROWEST, want) for want in wanted]
    if sum(least) > free:
        return None
    return _shared_out(wanted, least, free)


def _shared_out(wanted: list[int], least: list[int], free: int) -> list[int]:
    """Widths between `least` and `wanted` that take `free` together: the widest give most."""
    low, high = 0, max(wanted)
    while low < high:
        cap = (low + high + 1) // 2
        total = sum(max(some, min(want, cap)) for want, some in zip(wanted, least, strict=True))
        low, high = (cap, high) if total <= free else (low, cap - 1)
    widths = [max(some, min(want, low)) for want, some in zip(wanted, least, strict=True)]
    left = free - sum(widths)
    for column, want in enumerate(wanted):
        if left and widths[column] < want:
            widths[column] += 1
            left -= 1
    return widths


def _columns(rows: Sequence[Sequence[Spans]], widths: list[int], aligned: Sequence[str]) -> Iterator[Line]:
    wrapped = [[wrap(cell, wide, fold=True) for cell, wide in zip(row, widths, strict=True)] for row in rows]
    rule: Line = [("rule", _RULE * (sum(widths) + _BETWEEN * (len(widths) - 1)))]
    spread = any(len(cell) > 1 for row in wrapped[1:] for cell in row)
    for number, row in enumerate(wrapped):
        if number == 1 or (number and spread):
            yield rule
        for line in range(max(map(len, row))):
            cells = [cell[line] if line < len(cell) else [] for cell in row]
            yield _joined(cells, widths, aligned)
    if len(wrapped) == 1:
        yield rule


def _joined(cells: Sequence[Line], widths: Sequence[int], aligned: Sequence[str]) -> Line:
    joined: Line = []
    for cell, wide, where in zip(cells, widths, aligned, strict=True):
        if joined:
            joined.append(("", " " * _BETWEEN))
        # As most terminals draw joined emoji: columns stand in line there.
        free = wide - sum(cell_len(text) for _, text in cell)
        before = {"right": free, "center": free // 2}.get(where, 0)
        joined += [("", " " * before), *cell, ("", " " * (free - before))]
    return joined


def _records(rows: Sequence[Sequence[Spans]], width: int) -> Iterator[Line]:
    header, *others = rows
    for number, row in enumerate(others or [[() for _ in header]]):
        if number:
            yield [("rule", _RULE * width)]
        for name, cell in zip(header, row, strict=True):
            yield from wrap((*name, ("header", ": " if name else ""), *cell), width, fold=True)
