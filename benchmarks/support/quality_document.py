"""Tables in markdown, and their places in a document. Knows no figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def markdown(heads: Sequence[str], sides: str, rows: Iterable[Sequence[str]]) -> str:
    """A table; of `sides`, l is left, r right, m in the middle."""
    marks = {"l": "---", "r": "---:", "m": ":---:"}
    lines = [heads, [marks[side] for side in sides], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
