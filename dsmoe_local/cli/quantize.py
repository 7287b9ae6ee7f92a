"""`dsmoe quantize`: arguments and tables. What is done is dsmoe_quantize's task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.cli.type_options import TypeRow, show_types, summary_line, type_options, wishes_of

if TYPE_CHECKING:
    from dsmoe_quantize.quantize import Plan


@click.command(name="quantize")
@click.argument("source", metavar="IN.gguf", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT.gguf]", required=False, type=click.Path(path_type=Path))
@type_options
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Encode by what each weight counts, as dsmoe imatrix or llama-imatrix found it.",
)
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
    imatrix: Path | None,
    allow_requantize: bool,
    force: bool,
) -> None:
    """Make a smaller GGUF from a GGUF.

    TYPE is a recipe of ours (q4, q8), one of llama.cpp's mixes (Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0,
    Q4_1, IQ4_NL, IQ4_XS, ...), or f32, f16, bf16. OUT.gguf is <name>-<TYPE>.gguf in the current folder unless
    named. A run that was interrupted continues when the same command is given again.
    """
    from dsmoe_local.cli.render import run_with_progress, show_result
    from dsmoe_quantize.imatrix_file import read_imatrix
    from dsmoe_quantize.quantize import default_output, plan_quantization, quantize_file
    from dsmoe_quantize.types import known_words, resolve

    if word is None:
        raise UsageError("no type is given", remedy=f"--type {', '.join(known_words())}")
    choice = resolve(word)
    wishes = wishes_of(overrides, output_type, embedding_type, pure)
    plan = plan_quantization(
        source,
        choice,
        wishes,
        allow_requantize=allow_requantize or dry_run,
        imatrix=read_imatrix(imatrix) if imatrix else None,
    )
    if dry_run:
        _show(plan)
        return
    target = out or default_output(source, choice, wishes)
    summary = run_with_progress(
        lambda listen, stop: quantize_file(
            plan, target, threads=threads or 0, force=force, listen=listen, stop=stop
        )
    )
    show_result(summary_line(summary))


def _show(plan: Plan) -> None:
    """The table of a dry run, on stdout."""
    rows = [
        TypeRow(each.source.name, each.source.shape, each.source.type, each.choice, each.n_bytes)
        for each in plan.changes
    ]
    before = sum(change.source.n_bytes for change in plan.changes)
    show_types(
        rows,
        f"{len(rows)} tensors, {format_size(plan.n_bytes)} (from {format_size(before)}),"
        f" {plan.bits_per_weight:.2f} bits per weight,"
        f" {format_size(plan.n_bytes_per_token)} read per token",
    )
    if plan.n_requantized:
        click.echo(f"{plan.n_requantized} tensors are quantized already: this needs --allow-requantize")
