"""What commands print: results on stdout and notes on stderr, with the same look everywhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.text import safe_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


def console(file_columns: int = 0, *, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console that prints text as it is. In files and pipes lines have `file_columns`; 0: Rich's."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=soft_wrap)
    if file_columns and not made.is_terminal:
        made.width = file_columns
    return made


def plain_table(*headings: str, left: Collection[str] = (), wrap: Collection[str] = ()) -> Table:
    """Return an empty table with a line below its headings.

    Columns are aligned to the right and do not wrap, except those of `left` and `wrap`; the latter are
    aligned to the left, too.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for each in headings:
        is_left = each in left or each in wrap
        table.add_column(each, justify="left" if is_left else "right", no_wrap=each not in wrap)
    return table


def facts(rows: Iterable[Sequence[str]]) -> Table:
    """Return a grid of names and values."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column()
    for row in rows:
        grid.add_row(*row)
    return grid


def built_in_text() -> Text:
    """Return the line about the text that is read when none is named."""
    from rich.text import Text

    from dsmoe_local.evaluate.text import LICENCES

    return Text(f"The built-in text: {LICENCES}.", style="dim")


def print_json(value: Any, indent: int | None = None) -> None:  # noqa: ANN401 - a JSON value
    """Print a JSON value on stdout, in ASCII."""
    click.echo(json.dumps(value, indent=indent, ensure_ascii=True))


def show_result(text: str) -> None:
    """Print one line about what was done, on stderr."""
    sys.stderr.write(f"{safe_line(text, 400)}\n")


def show_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr."""
    for text in notes:
        click.echo(f"note: {safe_line(text, 400)}", err=True)
