"""`dsmoe quantize`: arguments and tables. What is done is dsmoe_quantize's task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import from_command_line, told_origin
from dsmoe_local.cli.model_options import ModelName, find_model
from dsmoe_local.cli.target_options import TARGETS, TargetOptions, show_offers, show_reasons, target_options
from dsmoe_local.cli.type_options import (
    TypeOptions,
    outweighed,
    show_notes,
    show_types,
    summary_line,
    type_options,
)
from dsmoe_quantize.policy.named_recipes import RECIPES

if TYPE_CHECKING:
    from dsmoe_quantize.policy.types import TypeChoice
    from dsmoe_quantize.quantize import Plan


@click.command(name="quantize")
@click.argument("model", metavar="MODEL", type=ModelName())
@click.argument("out", metavar="[OUT.gguf]", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", "named", metavar="OUT.gguf", type=click.Path(path_type=Path), help="As OUT.gguf."
)
@type_options
@target_options
@click.option("--allow-requantize", is_flag=True, help="Accept tensors that are quantized already.")
@click.option("--force", is_flag=True, help="Replace an existing output or recipe.")
def command(
    model: str,
    out: Path | None,
    named: Path | None,
    threads: int | None,
    dry_run: bool,
    allow_requantize: bool,
    force: bool,
    **values: Any,  # noqa: ANN401 - the options about types and targets
) -> None:
    """Make a smaller GGUF from a GGUF.

    MODEL is a file, or a name that `dsmoe models` lists.

    {types}

    OUT.gguf is <name>-<TYPE>.gguf in the current folder unless named. A run that was interrupted continues
    when the same command is given again.

    Instead of a type, a target may be given: then types are measured on the weights, and those are chosen
    that do the least harm within all targets.
    """
    from dsmoe_local.cli.render import run_with_progress, show_result
    from dsmoe_quantize.budget.explanation import stated_reasons
    from dsmoe_quantize.quantize import default_output, output_called, plan_quantization, quantize_file

    if out is not None and named is not None:
        raise UsageError("two outputs are named", remedy="leave out -o or the second argument")
    source, out = find_model(model), out or named
    values = outweighed(values, TARGETS)
    types, targets = TypeOptions.of(values), TargetOptions.of(values)
    targets.check(types)
    may_lose = allow_requantize or dry_run
    if targets.has_target:
        output = out or output_called(source, targets.request().name)
        _check_places(source, output, targets.recipe_out, force=force, dry_run=dry_run)
        plan = _solved(source, types, targets, threads or 0, may_lose=may_lose, dry_run=dry_run)
    else:
        choice, overrides = _choice(types, out), types.parsed_overrides()
        output = out or default_output(source, choice, overrides)
        _check_places(source, output, targets.recipe_out, force=force, dry_run=dry_run)
        plan = plan_quantization(
            source, choice, overrides, allow_requantize=may_lose, imatrix=types.imatrix()
        )
        if targets.explain:
            show_reasons(stated_reasons(plan))
    if targets.recipe_out is not None:
        _write_recipe(plan, targets.recipe_out, force=force)
    if dry_run:
        _show(plan, output)
        show_notes(plan.notes)
        return
    summary = run_with_progress(
        lambda listen, stop: quantize_file(
            plan, output, threads=threads or 0, force=force, listen=listen, stop=stop
        )
    )
    show_result(summary_line(summary))


def _check_places(source: Path, output: Path, recipe_out: Path | None, *, force: bool, dry_run: bool) -> None:
    """Raise, before any work, what would be raised after it about the files to write."""
    from dsmoe_quantize.policy.recipe_file import refuse_place
    from dsmoe_quantize.write.output import refuse_early

    if recipe_out is not None:
        refuse_place(recipe_out, (source, output))
    if not dry_run:
        refuse_early(output, force, [source])


def _choice(types: TypeOptions, out: Path | None) -> TypeChoice:
    """What --type or --recipe names. UsageError if neither is given; as llama-quantize wants it, the type may
    be where `out` belongs.
    """
    from dsmoe_quantize.policy.types import known_words, resolve

    if types.word is not None:
        with told_origin("word"):
            return resolve(types.word)
    recipe = types.recipe()
    if recipe is None:
        wanted = next((each for each in known_words() if out and out.name.lower() == each.lower()), None)
        remedy = f"--type {wanted}" if wanted else f"--type {', '.join(known_words())}; or a target"
        raise UsageError("no type is given", remedy=remedy)
    return recipe


def _solved(
    source: Path,
    types: TypeOptions,
    targets: TargetOptions,
    threads: int,
    *,
    may_lose: bool,
    dry_run: bool,
) -> Plan:
    """The best types for a target; then the trade-off is shown."""
    from dsmoe_local.cli.render import run_with_progress
    from dsmoe_local.model.gguf_model import read_model
    from dsmoe_quantize.budget.explanation import reasons
    from dsmoe_quantize.budget.target import refuse_quantized, solve_target
    from dsmoe_quantize.policy.choice import refuse_unmatched
    from dsmoe_quantize.policy.plan import refuse_foreign

    request, overrides, imatrix = targets.request(), types.parsed_overrides(), types.imatrix()
    file, hp = read_model(source)
    if not may_lose:
        refuse_quantized(file)
    # Before minutes of measuring.
    tensors = list(file.tensors.values())
    refuse_unmatched(tensors, overrides)
    refuse_foreign(imatrix, tensors)
    target = run_with_progress(
        lambda listen, stop: solve_target(
            file, hp, request, overrides, imatrix, threads=threads, listen=listen, stop=stop
        )
    )
    show_offers(target, request.budget, to_stderr=not dry_run)
    if targets.explain:
        show_reasons(reasons(target.costs, target.solved))
    return target.solved.plan


def _write_recipe(plan: Plan, path: Path, *, force: bool) -> None:
    """Write the plan's recipe as a file. UsageError if it follows llama.cpp's rules, which are none."""
    from dsmoe_quantize.policy.recipe_file import write_recipe
    from dsmoe_quantize.policy.recipes import LayeredRecipe

    recipe = plan.record.type
    if isinstance(recipe, LayeredRecipe):
        write_recipe(recipe, path, force=force)
    elif from_command_line("recipe_out"):
        raise UsageError(
            f"{recipe.name} is no recipe: there is nothing to write to {path}",
            remedy=f"--recipe-out goes with a target or --type {', '.join(RECIPES)}",
        )


def _show(plan: Plan, out: Path) -> None:
    """The table of a dry run, on stdout."""
    before = sum(plan.file.tensors[choice.name].n_bytes for choice in plan.choices)
    show_types(
        plan.choices,
        f"{safe_line(str(out))}: {len(plan.choices)} tensors, {format_size(plan.n_bytes)}"
        f" (from {format_size(before)}), {plan.bits_per_weight:.2f} bits per weight,"
        f" {format_size(plan.n_bytes_per_token)} read per token",
    )
    if plan.n_requantized:
        click.echo(f"{plan.n_requantized} tensors are quantized already: this needs --allow-requantize")
