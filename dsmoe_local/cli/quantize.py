"""`dsmoe quantize`: arguments and tables. What is done is dsmoe_quantize's task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line

if TYPE_CHECKING:
    from dsmoe_quantize.choose import Wishes
    from dsmoe_quantize.quantize import Plan


@click.command(name="quantize")
@click.argument("source", metavar="IN.gguf", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT.gguf]", required=False, type=click.Path(path_type=Path))
@click.option("--type", "word", metavar="TYPE", help="q4, q8, or a type of llama.cpp's, such as Q4_K_M.")
@click.option(
    "--tensor-type",
    "overrides",
    multiple=True,
    metavar="REGEX=TYPE",
    help="Type of the tensors whose whole name matches. Repeatable; the first match wins.",
)
@click.option("--output-type", metavar="TYPE", help="Type of the output matrix.")
@click.option("--embedding-type", metavar="TYPE", help="Type of the token embedding.")
@click.option("--pure", is_flag=True, help="The same type for every matrix.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Encoding threads.  [default: all cores]")
@click.option("--dry-run", is_flag=True, help="Show what would be written, tensor by tensor.")
@click.option("--allow-requantize", is_flag=True, help="Accept tensors that are quantized already.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
def command(
    source: Path,
    out: Path | None,
    word: str | None,
    overrides: tuple[str, ...],
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
    threads: int | None,
    dry_run: bool,
    allow_requantize: bool,
    force: bool,
) -> None:
    """Make a smaller GGUF from a GGUF.

    TYPE is a recipe of ours (q4, q8), one of llama.cpp's mixes (Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0,
    Q4_1, IQ4_NL, IQ4_XS, ...), or f32, f16, bf16. OUT.gguf is <name>-<TYPE>.gguf in the current folder unless
    named. A run that was interrupted continues when the same command is given again.
    """
    from dsmoe_local.cli.render import run_with_progress, show_result
    from dsmoe_quantize.quantize import default_output, plan_quantization, quantize_file
    from dsmoe_quantize.types import known_words, resolve

    if word is None:
        raise UsageError("no type is given", remedy=f"--type takes one of {', '.join(known_words())}")
    choice = resolve(word)
    wishes = _wishes(overrides, output_type, embedding_type, pure)
    plan = plan_quantization(source, choice, wishes, allow_requantize=allow_requantize or dry_run)
    if dry_run:
        _show(plan)
        return
    target = out or default_output(source, choice)
    summary = run_with_progress(
        lambda listen, stop: quantize_file(
            plan, target, threads=threads or 0, force=force, listen=listen, stop=stop
        )
    )
    show_result(
        f"{summary.path}: {format_size(summary.n_bytes)}, {summary.bits_per_weight:.2f} bits per weight,"
        f" {summary.seconds:.1f} s, peak memory {format_size(summary.peak_memory)}"
    )


def _wishes(
    overrides: tuple[str, ...], output_type: str | None, embedding_type: str | None, pure: bool
) -> Wishes:
    from dsmoe_quantize.choose import Wishes, parse_override
    from dsmoe_quantize.types import parse_target

    return Wishes(
        overrides=tuple(map(parse_override, overrides)),
        output=parse_target(output_type) if output_type else None,
        embedding=parse_target(embedding_type) if embedding_type else None,
        pure=pure,
    )


def _show(plan: Plan) -> None:
    """The table of a dry run, on stdout."""
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
    for change in plan.changes:
        table.add_row(
            safe_line(change.source.name),
            " x ".join(map(str, change.source.shape)),
            type_name(change.source.type),
            type_name(change.choice.type),
            format_size(change.n_bytes),
            "; ".join(filter(None, (change.choice.reason, change.choice.misfit))),
        )
    console.print(table)
    before = sum(change.source.n_bytes for change in plan.changes)
    console.print(
        f"{len(plan.changes)} tensors, {format_size(plan.n_bytes)} (from {format_size(before)}),"
        f" {plan.bits_per_weight:.2f} bits per weight,"
        f" {format_size(plan.n_bytes_per_token)} read per token"
    )
