"""`dsmoe models`: the model files that a name is enough for. `model.discovery` finds them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsmoe_local.base.paths import absolute
from dsmoe_local.base.sizes import format_size
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import models_folder

if TYPE_CHECKING:
    from rich.text import Text

    from dsmoe_local.model.discovery import ModelDescription

_WIDE = 80
"""Columns from which on it is shown where a model lies."""


@click.command(name="models")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(as_json: bool) -> None:
    """List the models that are found by name: -m takes a name from this list, or a file.

    They are the GGUF files in this folder, those in the models folder and the folders in it, the demo's, and
    what was loaded lately. Of files of one name the first is meant. The models folder is models-folder in the
    config file, or DSMOE_MODELS_FOLDER.
    """
    from dsmoe_local.model.discovery import describe, known_models

    folder = models_folder()
    models = [describe(model) for model in known_models(folder)]
    if as_json:
        result = {"models_folder": str(folder), "models": [_as_json(each) for each in models]}
        click.echo(json.dumps(result, indent=2, ensure_ascii=True))
        return
    if models:
        _show(models)
    else:
        click.echo("no models are known yet: convert one with dsmoe-convert, or make the demo's: dsmoe demo")
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
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    wide = console.width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("name", overflow="fold", min_width=12)
    for heading in ("size", "type", "context"):
        table.add_column(heading, justify="right" if heading != "type" else "left", no_wrap=True)
    if wide:
        table.add_column("from", no_wrap=True)
        table.add_column("file", overflow="fold")
    for each in models:
        table.add_row(*_row(each, wide=wide))
    console.print(table)


def _row(description: ModelDescription, *, wide: bool) -> list[Text]:
    """The cells of a model; in a narrow terminal only what it is, not where."""
    from rich.text import Text

    reason = Text(safe_line(description.reason), style="red")
    cells = [
        Text(safe_line(description.model.name), style="dim" if description.reason else "bold"),
        Text(format_size(description.n_bytes)),
        Text(safe_line(description.type, 40)),
        Text(f"{description.n_context:,}" if description.n_context else ""),
    ]
    file = Text(safe_line(_in_home(description.model.path)), style="dim")
    if wide:
        return [*cells, Text(description.model.group), Text("\n").join([reason, file] if reason else [file])]
    if reason:
        cells[0] = Text("\n").join([cells[0], reason])
    return cells


def _in_home(path: Path) -> str:
    """The path as people write it: ~ for their home."""
    home = os.path.expanduser("~")
    return f"~/{path.relative_to(home)}" if home != "/" and path.is_relative_to(home) else str(path)
