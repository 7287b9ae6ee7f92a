"""Writes the tables of benchmarks in Markdown, for the terminal and for docs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from benchmarks.support.runner import HEADS, SIDES, Row

LOAD = os.getloadavg()[0]
"""The load of the machine before anything is measured."""


def markdown(heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown. `sides` has a letter for each column: l for left, r for right."""
    marks = {"l": "---", "r": "---:"}
    lines = [heads, [marks[side] for side in sides], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(title: str, heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> None:
    """Print a title and a table."""
    print(f"{title}\n\n{markdown(heads, sides, rows)}\n")


def report(title: str, rows: Sequence[Row], record: Mapping[str, object]) -> None:
    """Print a table of comparisons, then one JSON line with the record, the load and the rows."""
    show(title, HEADS, SIDES, [row.cells() for row in rows])
    rows_as_json = [row.as_json() for row in rows]
    print(json.dumps({**record, "load_before": round(LOAD, 2), "rows": rows_as_json}))


Column: TypeAlias = tuple[str, str, Callable[[Any], str]]
"""The head of a column, its side, and its cell for a row."""


def markdown_of(columns: Sequence[Column], rows: Iterable[object]) -> str:
    """Return a table in Markdown with a line for each row."""
    heads, sides, cells = zip(*columns, strict=True)
    return markdown(heads, "".join(sides), [[cell(row) for cell in cells] for row in rows])


def with_tables(text: str, tables: Mapping[str, str]) -> str:
    """Return the document with each table between its marks, `<!-- table: NAME -->` and `<!-- end -->`.
    ValueError if a mark is missing.
    """
    for name, table in tables.items():
        begin, end = f"<!-- table: {name} -->\n", "\n<!-- end -->"
        start = text.find(begin)
        stop = text.find(end, start)
        if start < 0 or stop < 0:
            raise ValueError(f"the document has no place for the table {name}")
        text = text[: start + len(begin)] + table + text[stop:]
    return text
