"""Writes the tables of benchmarks: on the terminal, with a JSON line below, and in the markdown of docs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table

from benchmarks.support.runner import HEADS, SIDES, Row

_WIDTH = 200
"""Of a table in a file or a pipe, which have no width to fit into."""


def show(title: str, heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> None:
    """A table on stdout. `sides` has a letter for each column: l for left, r for right."""
    table = Table(title=title, title_justify="left", title_style="", box=None)
    for head, side in zip(heads, sides, strict=True):
        table.add_column(head, justify="right" if side == "r" else "left")
    for row in rows:
        table.add_row(*row)
    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    console.print(table, highlight=False)


def report(title: str, rows: Sequence[Row], record: Mapping[str, object]) -> None:
    """A table of comparisons, then one JSON line: the record and the rows."""
    show(title, HEADS, SIDES, [row.cells() for row in rows])
    print(json.dumps({**record, "rows": [row.as_json() for row in rows]}))


def markdown(heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in markdown; `sides` as of `show`."""
    marks = {"l": "---", "r": "---:"}
    lines = [heads, [marks[side] for side in sides], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Column: TypeAlias = tuple[str, str, Callable[[Any], str]]
"""Its head, its side, and the cell of a row."""


def markdown_of(columns: Sequence[Column], rows: Iterable[object]) -> str:
    """A table in markdown, a line for each row."""
    heads, sides, cells = zip(*columns, strict=True)
    return markdown(heads, "".join(sides), [[cell(row) for cell in cells] for row in rows])


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """A document with the tables between their marks: `<!-- table: NAME -->` and `<!-- end -->`. ValueError
    if a mark is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        start = text.find(begin)
        stop = text.find(end, start)
        if start < 0 or stop < 0:
            raise ValueError(f"the document has no place for the table {name}")
        text = text[: start + len(begin)] + table + text[stop:]
    return text
