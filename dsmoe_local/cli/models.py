"""`dsmoe models`: the model files that can be named without a path. `model.discovery` finds them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.paths import absolute
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.model_argument import models_folder
from dsmoe_local.cli.options import json_option
from dsmoe_local.cli.output import console, plain_table, print_json

if TYPE_CHECKING:
    from rich.text import Text

    from dsmoe_local.model.discovery import ModelDescription

_COLUMNS = ("name", "size", "type", "context", "from", "file")
_FILE_COLUMNS = 1000  # where the output is a file or a pipe: nothing is left out


@define_command(
    "models",
    ("dsmoe models", "List names, sizes and types."),
    ("DSMOE_MODELS_FOLDER=/data dsmoe models", "Look in another folder."),
)
@json_option()
def command(as_json: bool) -> None:
    """List the models that can be named without a path, as in -m NAME.

    These are the GGUF files in the current folder, in the models folder and its subfolders, the demo model,
    and recently loaded files. If two files have the same name, the first one is used. DSMOE_MODELS_FOLDER, or
    models-folder in the config file, sets the models folder.
    """
    from dsmoe_local.model.discovery import describe, known_models, unfinished_downloads
    from dsmoe_local.model.split_name import model_stem

    folder, _ = models_folder()
    models = [describe(model) for model in known_models(folder)]
    if as_json:
        print_json({"models_folder": str(folder), "models": [_as_json(each) for each in models]}, indent=2)
        return
    unfinished = unfinished_downloads(folder)
    if models:
        _show(models)
    else:
        click.echo("no models found: download one with dsmoe pull, or make the demo model: dsmoe demo")
    for final, parts in unfinished.items():
        name, size = safe_line(model_stem(final)), format_size(sum(part.stat().st_size for part in parts))
        click.echo(
            f"unfinished download: {name}, {size} so far; dsmoe pull continues it, dsmoe rm deletes it"
        )
    click.echo(f"models folder: {safe_line(str(folder))}")


def _as_json(description: ModelDescription) -> dict[str, Any]:
    model = description.model
    usable = not description.reason
    return {
        "name": model.name,
        "path": str(absolute(model.path)),
        "from": model.group,
        "bytes": description.n_bytes,
        "type": description.type if usable else None,
        "context": description.n_context if usable else None,
        "title": description.title if usable else None,
        "error": description.reason or None,
    }


def _show(models: list[ModelDescription]) -> None:
    """Print a table. Names are not broken: in a narrow terminal, the table has fewer columns."""
    out = console(file_columns=_FILE_COLUMNS)
    rows = [_row(each) for each in models]
    for columns in (_COLUMNS, _COLUMNS[:-2], _COLUMNS[:1]):
        table = plain_table(*columns, left=("name", "type", "from", "file"))
        for row in rows:
            table.add_row(*row[: len(columns)])
        needed = out.measure(table, options=out.options.update(width=_FILE_COLUMNS)).maximum
        if needed <= out.width:
            break
    else:
        # The terminal wraps the lines, but a name can be copied as one word.
        out.width = needed
    out.print(table)
    for each in models:
        if each.reason:
            click.echo(f"{safe_line(each.model.name)} cannot be used: {safe_line(each.reason)}")
    if columns is not _COLUMNS:
        click.echo("Wider terminals show more columns; --json prints everything.")


def _row(description: ModelDescription) -> list[Text]:
    """Return the cells of a model."""
    from rich.text import Text

    return [
        Text(safe_line(description.model.name), style="dim" if description.reason else "bold"),
        Text(format_size(description.n_bytes)),
        Text(safe_line(description.type, 40)),
        Text(f"{description.n_context:,}" if description.n_context else ""),
        Text(description.model.group),
        Text(safe_line(_in_home(description.model.path)), style="dim"),
    ]


def _in_home(path: Path) -> str:
    """Return a path with ~ for the home folder."""
    home = os.path.expanduser("~")
    return f"~/{path.relative_to(home)}" if home != "/" and path.is_relative_to(home) else str(path)
