"""How commands are told which model to use: an argument or -m, as a path or as the name of a known model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsmoe_local.base import config_file
from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.paths import demo_folder
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.option_sources import (
    Origin,
    Source,
    from_command_line,
    source_in_errors,
)
from dsmoe_local.cli.options import Kind, option

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

F = TypeVar("F", bound=Callable[..., Any])

DEMO_MODEL = "demo-q4.gguf"


def complete_model(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the names of known models; files if a path is typed or no name fits."""
    from click.shell_completion import CompletionItem

    from dsmoe_local.model.discovery import known_models

    wanted = incomplete.casefold()
    try:
        known = [] if os.sep in incomplete else known_models(models_folder()[0])
    except DsmoeError:
        # The config file is broken. The command itself will report it.
        known = []
    names = [model.name for model in known if model.name.casefold().startswith(wanted)]
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


MODEL: Kind = {"metavar": "NAME|FILE", "shell_complete": complete_model}
"""The path of a model file, or the name of a known model; `find_model` resolves it."""

model_option: Callable[[F], F] = option(
    "-m, --model",
    "named_model",
    "The model: a file, or a name that `dsmoe models` lists.",
    MODEL,
    shown="the demo's",
)
"""Adds -m to a command, as `named_model`."""


def model_argument(name: str, metavar: str, **attributes: Any) -> Callable[[F], F]:  # noqa: ANN401 - click's
    """Return a decorator that adds an argument that names models."""
    return click.argument(name, metavar=metavar, shell_complete=complete_model, **attributes)


def models_folder() -> tuple[Path, Origin]:
    """Return the folder where models are looked for by name, and what set it. Raises FormatError."""
    folder, where = config_file.models_folder()
    if not where:
        return folder, Origin(Source.BUILT_IN)
    return folder, Origin(Source.VARIABLE if where == config_file.MODELS_VARIABLE else Source.CONFIG, where)


def find_model(
    argument: str | None = None, named_model: str | None = None, others: Iterable[str] = ()
) -> Path:
    """Return the file of the model that a command names, by an argument or by -m; else the demo model.

    `others` are words that the command accepts besides models, for the error message. UsageError if no model
    is named and the demo model is not made yet, or if the name is unknown or ambiguous; FileError for a path
    that is not a file.
    """
    # An argument overrides a -m from a variable or the config file.
    if argument and named_model and argument != named_model and from_command_line("named_model"):
        raise UsageError(
            f"two models are named: -m and {safe_line(argument, 60)!r}", remedy="leave one of them out"
        )
    if argument:
        return _model_file(argument, others)
    if named_model:
        with source_in_errors("named_model"):
            return _model_file(named_model, others)
    demo = demo_folder() / DEMO_MODEL
    if not demo.is_file():
        raise UsageError(
            "no model is named, and the demo model is not made yet",
            remedy="name one with -m FILE.gguf, or make the demo model: dsmoe demo",
        )
    click.echo(f"note: no model named: using the demo's, {demo}", err=True)
    return demo


def _model_file(word: str, others: Iterable[str]) -> Path:
    from dsmoe_local.model.discovery import find_model_files, several_of_one_name

    paths = find_model_files(word, models_folder()[0], others)
    if len(paths) > 1:
        click.echo(f"note: {several_of_one_name(paths)}", err=True)
    return paths[0]
