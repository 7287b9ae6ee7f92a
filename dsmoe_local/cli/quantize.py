"""`dsmoe quantize`: arguments and tables. What is done is dsmoe_quantize's task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.cli.target_options import TargetOptions, show_offers, show_reasons, target_options
from dsmoe_local.cli.type_options import TypeRow, show_types, summary_line, type_options, wishes_of

if TYPE_CHECKING:
    from dsmoe_quantize.choose import Wishes
    from dsmoe_quantize.imatrix import Imatrix
    from dsmoe_quantize.quantize import Plan


@click.command(name="quantize")
@click.argument("source", metavar="IN.gguf", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT.gguf]", required=False, type=click.Path(path_type=Path))
@type_options
@target_options
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
    **target: Any,  # noqa: ANN401 - the options of a target
) -> None:
    """Make a smaller GGUF from a GGUF.

    TYPE is a recipe of ours (q4, q8), one of llama.cpp's mixes (Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0,
    Q4_1, IQ4_NL, IQ4_XS, ...), or f32, f16, bf16. OUT.gguf is <name>-<TYPE>.gguf in the current folder unless
    named. A run that was interrupted continues when the same command is given again.

    Instead of a type, a target may be given: then types are measured on the weights, and those are chosen
    that do the least harm within all targets.
    """
    from dsmoe_local.cli.render import run_with_progress, show_result
    from dsmoe_quantize.imatrix_file import read_imatrix
    from dsmoe_quantize.quantize import default_output, quantize_file

    word, options = TargetOptions(**target).outweighed(word)
    options.check(word, pure)
    wishes = wishes_of(overrides, output_type, embedding_type, pure)
    imatrix = read_imatrix(options.imatrix_file) if options.imatrix_file else None
    plan = _plan(source, word, options, wishes, imatrix, threads or 0, allow_requantize or dry_run, dry_run)
    if dry_run:
        _show(plan)
        return
    output = out or default_output(source, plan.type, wishes)
    summary = run_with_progress(
        lambda listen, stop: quantize_file(
            plan, output, threads=threads or 0, force=force, listen=listen, stop=stop
        )
    )
    show_result(summary_line(summary))


def _plan(
    source: Path,
    word: str | None,
    options: TargetOptions,
    wishes: Wishes,
    imatrix: Imatrix | None,
    threads: int,
    allow_requantize: bool,
    dry_run: bool,
) -> Plan:
    """The types asked for, or the best for a target; then the trade-off is shown, and the recipe written."""
    from dsmoe_local.cli.render import run_with_progress
    from dsmoe_local.model.gguf_model import read_model
    from dsmoe_quantize.quantize import plan_quantization
    from dsmoe_quantize.recipe_file import read_recipe, write_recipe
    from dsmoe_quantize.target import refuse_quantized, solve_target
    from dsmoe_quantize.types import known_words, resolve

    if not options.has_target:
        if word is None and options.recipe_file is None:
            raise UsageError("no type is given", remedy=f"--type {', '.join(known_words())}; or a target")
        choice = read_recipe(options.recipe_file) if options.recipe_file else resolve(word or "")
        return plan_quantization(source, choice, wishes, allow_requantize=allow_requantize, imatrix=imatrix)
    request = options.request()
    file, hp = read_model(source)
    if not allow_requantize:
        refuse_quantized(file)
    target = run_with_progress(
        lambda listen, stop: solve_target(
            file, hp, request, wishes, imatrix, threads=threads, listen=listen, stop=stop
        )
    )
    show_offers(target, request.budget, to_stderr=not dry_run)
    if options.explain:
        show_reasons(target)
    if options.recipe_out:
        write_recipe(target.solved.recipe, options.recipe_out)
    return target.solved.plan


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
