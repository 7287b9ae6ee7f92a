"""`dsmoe quantize`: arguments and tables. dsmoe_quantize does the work."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.calibration_options import (
    CalibrationOptions,
    calibration_options,
    with_room_for_record,
)
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import find_model, model_argument
from dsmoe_local.cli.option_sources import from_command_line, source_in_errors
from dsmoe_local.cli.options import FLAG, option, path_value
from dsmoe_local.cli.output import built_in_text, console, show_notes, show_result
from dsmoe_local.cli.progress import run_with_progress
from dsmoe_local.cli.target_options import TARGETS, TargetOptions, show_offers, show_reasons, target_options
from dsmoe_local.cli.type_options import (
    TypeOptions,
    files_note,
    parse_split_size,
    settle_types,
    show_types,
    summary_line,
    type_options,
)
from dsmoe_quantize.policy.named_recipes import RECIPES

if TYPE_CHECKING:
    from dsmoe_quantize.budget.target import Request
    from dsmoe_quantize.policy.types import TypeChoice
    from dsmoe_quantize.quantize import Plan


@define_command(
    "quantize",
    ("dsmoe quantize model-bf16.gguf --type q4", "Write model-bf16-q4.gguf."),
    ("dsmoe quantize m.gguf --target-size 9.2GiB", "Choose types for a size."),
    ("dsmoe quantize m.gguf --type q4 --calibrate", "Lose less: calibrate."),
    ("dsmoe quantize m.gguf --type q8 --dry-run", "Only show the types."),
)
@model_argument("model", "MODEL")
@click.argument("outs", metavar="[OUT.gguf]", nargs=-1, type=click.Path(path_type=Path))
@option(
    "-o, --output",
    "named",
    "File to write; the same as the argument OUT.gguf.",
    path_value("OUT.gguf"),
    shown="<name>-<TYPE>.gguf",
)
@type_options
@target_options
@calibration_options
@option("--allow-requantize", "allow_requantize", "Accept tensors that are already quantized.", FLAG)
@option("--force", "force", "Replace an existing output or recipe.", FLAG)
def command(
    model: str,
    outs: tuple[Path, ...],
    named: Path | None,
    threads: int | None,
    dry_run: bool,
    split_max_size: str | None,
    allow_requantize: bool,
    force: bool,
    **values: Any,  # noqa: ANN401 - the options about types, targets and calibration
) -> None:
    """Quantize a GGUF file.

    MODEL is a file, or a name that `dsmoe models` lists.

    {types}

    Instead of a type, you can give a target, such as a size. The error of each type is then measured on the
    weights, and the types with the least total error within all targets are used.

    By default, the file is written to the current folder. Run the same command again to continue an
    interrupted run.
    """
    from dsmoe_quantize.budget.explanation import stated_reasons
    from dsmoe_quantize.quantize import default_output, output_called, plan_quantization

    out = _output(model, [*outs, *([named] if named else [])])
    source = find_model(model)
    values = settle_types(values, *TARGETS)
    types, targets = TypeOptions.of(values), TargetOptions.of(values)
    calibration = CalibrationOptions.of(values)
    targets.check(types)
    if calibration.calibrate is not None:
        calibration.check()
    may_lose, split = allow_requantize or dry_run, parse_split_size(split_max_size)
    if targets.has_target:
        output = out or output_called(source, targets.request().name)
        _check_places(source, output, targets.recipe_out, force=force, dry_run=dry_run, split=bool(split))
        request = targets.request()
        if calibration.calibrate is not None:
            request = with_room_for_record(request)
        plan = _solved(source, types, targets, request, threads or 0, may_lose=may_lose, dry_run=dry_run)
    else:
        choice, overrides = _choice(types, out), types.parsed_overrides()
        output = out or default_output(source, choice, overrides)
        _check_places(source, output, targets.recipe_out, force=force, dry_run=dry_run, split=bool(split))
        plan = plan_quantization(
            source, choice, overrides, allow_requantize=may_lose, imatrix=types.imatrix()
        )
        if targets.explain:
            show_reasons(stated_reasons(plan))
    if targets.recipe_out is not None:
        _write_recipe(plan, targets.recipe_out, force=force)
    if dry_run:
        _show(plan, output, split)
        show_notes(plan.notes)
        return
    _write(
        plan,
        output,
        calibration,
        split_max_size=split,
        threads=threads or 0,
        force=force,
    )


def _write(plan: Plan, output: Path, calibration: CalibrationOptions, **others: Any) -> None:  # noqa: ANN401
    """Quantize, calibrated or not, and print what was written."""
    from dsmoe_quantize.quantize import quantize_file

    if calibration.calibrate is None:
        summary = run_with_progress(
            lambda listen, stop: quantize_file(plan, output, **others, listen=listen, stop=stop)
        )
        show_result(summary_line(summary))
        return
    from dsmoe_quantize.calibrated.calibrator import quantize_calibrated

    tokens = calibration.calibration(plan.file.path)
    summary = run_with_progress(
        lambda listen, stop: quantize_calibrated(
            plan, output, tokens, device=calibration.device, **others, listen=listen, stop=stop
        )
    )
    show_result(summary_line(summary))
    if not calibration.calibrate:
        console(stderr=True).print(built_in_text())


def _check_places(
    source: Path, output: Path, recipe_out: Path | None, *, force: bool, dry_run: bool, split: bool
) -> None:
    """Raise, before any work, the errors about output files."""
    from dsmoe_quantize.policy.recipe_file import refuse_place
    from dsmoe_quantize.write.output import refuse_early

    if recipe_out is not None:
        refuse_place(recipe_out, (source, output))
    if not dry_run:
        refuse_early(output, force, [source], split=split)


def _output(model: str, named: Sequence[Path]) -> Path | None:
    """Return the output that is named, if any. UsageError for several.

    In llama-quantize, arguments name the type and the number of threads: the error has the right command.
    """
    from dsmoe_quantize.policy.types import known_words

    if len(named) < 2:
        return named[0] if named else None
    words = {each.casefold(): each for each in known_words()}
    wanted = next((words[path.name.casefold()] for path in named if path.name.casefold() in words), None)
    if wanted is None:
        raise UsageError("two outputs are named", remedy="name one")
    out = [str(path) for path in named[:1] if path.name.casefold() not in words]
    command = ["dsmoe", "quantize", model, *out, "--type", wanted]
    raise UsageError(f"the type {wanted} is not an argument here, but an option", remedy=shlex.join(command))


def _choice(types: TypeOptions, out: Path | None) -> TypeChoice:
    """Return what --type or --recipe names. UsageError if neither is given.

    A type in place of `out` gets a hint: in llama-quantize, it is the last argument.
    """
    from dsmoe_quantize.policy.types import known_words, resolve, unknown_type

    if types.word is not None:
        with source_in_errors("word"):
            return resolve(types.word)
    recipe = types.recipe()
    if recipe is None:
        wanted = next((each for each in known_words() if out and out.name.lower() == each.lower()), None)
        if wanted is not None:
            raise UsageError("no type is given", remedy=f"--type {wanted}")
        raise unknown_type("no type is given: add --type TYPE, or a target such as --target-size 9.2GiB")
    return recipe


def _solved(
    source: Path,
    types: TypeOptions,
    targets: TargetOptions,
    request: Request,
    threads: int,
    *,
    may_lose: bool,
    dry_run: bool,
) -> Plan:
    """Return the plan with the best types for a target, and show the trade-off."""
    from dsmoe_local.model.gguf_model import read_model
    from dsmoe_quantize.budget.explanation import reasons
    from dsmoe_quantize.budget.target import refuse_quantized, solve_target
    from dsmoe_quantize.policy.choice import refuse_unmatched
    from dsmoe_quantize.policy.plan import refuse_foreign

    overrides, imatrix = types.parsed_overrides(), types.imatrix()
    file, hp = read_model(source)
    if not may_lose:
        refuse_quantized(file)
    # Before measuring, which takes minutes.
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
    """Write the recipe of a plan to a file. UsageError if the plan follows llama.cpp's rules instead."""
    from dsmoe_quantize.policy.recipe_file import write_recipe
    from dsmoe_quantize.policy.recipes import LayeredRecipe

    recipe = plan.record.type
    if isinstance(recipe, LayeredRecipe):
        write_recipe(recipe, path, force=force)
    elif from_command_line("recipe_out"):
        raise UsageError(
            f"{recipe.name} is not a recipe: there is nothing to write to {path}",
            remedy=f"--recipe-out needs a target or --type {', '.join(RECIPES)}",
        )


def _show(plan: Plan, out: Path, split_max_size: int | None) -> None:
    """Print the table of a dry run on stdout."""
    files = files_note(plan.metadata, plan.choices, split_max_size)
    before = sum(plan.file.tensors[choice.name].n_bytes for choice in plan.choices)
    show_types(
        plan.choices,
        f"{safe_line(str(out))}: {len(plan.choices)} tensors, {format_size(plan.n_bytes)}{files}"
        f" (from {format_size(before)}), {plan.bits_per_weight:.2f} bits per weight,"
        f" {format_size(plan.n_bytes_per_token)} read per token",
    )
    if plan.n_requantized:
        click.echo(f"{plan.n_requantized} tensors are already quantized: --allow-requantize is needed")
