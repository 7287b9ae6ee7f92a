"""What convert and quantize share on the command line: options about types, the table of a dry run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line

if TYPE_CHECKING:
    from dsmoe_local.model.ggml import GgmlType
    from dsmoe_quantize.choose import Choice, Wishes
    from dsmoe_quantize.output import Summary

Function = TypeVar("Function", bound=Callable[..., Any])

_OPTIONS = (
    click.option("--type", "word", metavar="TYPE", help="q4, q8, or a type of llama.cpp's, such as Q4_K_M."),
    click.option(
        "--tensor-type",
        "overrides",
        multiple=True,
        metavar="REGEX=TYPE",
        help="Type of the tensors whose whole name matches. Repeatable; the first match wins.",
    ),
    click.option("--output-type", metavar="TYPE", help="Type of the output matrix."),
    click.option("--embedding-type", metavar="TYPE", help="Type of the token embedding."),
    click.option("--pure", is_flag=True, help="The same type for every matrix."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Encoding threads.  [default: all cores]"),
    click.option("--dry-run", is_flag=True, help="Show what would be written, tensor by tensor."),
)


def type_options(function: Function) -> Function:
    """Add the options to a command: word, overrides, output_type, embedding_type, pure, threads, dry_run."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def wishes_of(
    overrides: tuple[str, ...], output_type: str | None, embedding_type: str | None, pure: bool
) -> Wishes:
    """The options about single tensors as data. UsageError for a word that is no type."""
    from dsmoe_quantize.choose import Wishes, parse_override
    from dsmoe_quantize.types import parse_target

    return Wishes(
        overrides=tuple(map(parse_override, overrides)),
        output=parse_target(output_type) if output_type else None,
        embedding=parse_target(embedding_type) if embedding_type else None,
        pure=pure,
    )


@dataclass(frozen=True, slots=True)
class TypeRow:
    """A tensor of the dry run's table."""

    name: str
    shape: Sequence[int]
    before: GgmlType
    choice: Choice
    n_bytes: int


def show_types(rows: Sequence[TypeRow], totals: str) -> None:
    """Print the table of a dry run on stdout, and a line below it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from dsmoe_local.model.ggml import type_name

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("tensor", "shape", "from", "to"):
        table.add_column(heading, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("why")
    for row in rows:
        table.add_row(
            safe_line(row.name),
            " x ".join(map(str, row.shape)),
            type_name(row.before),
            type_name(row.choice.type),
            format_size(row.n_bytes),
            "; ".join(filter(None, (row.choice.reason, row.choice.misfit))),
        )
    console.print(table)
    console.print(totals)


def summary_line(summary: Summary) -> str:
    """One line about a file that was written."""
    return (
        f"{summary.path}: {format_size(summary.n_bytes)}, {summary.bits_per_weight:.2f} bits per weight,"
        f" {summary.seconds:.1f} s, peak memory {format_size(summary.peak_memory)}"
    )
