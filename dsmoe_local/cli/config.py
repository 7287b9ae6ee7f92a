"""`dsmoe config`: shows every option of a command, its value and the source of the value."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsmoe_local.base.config_file import MODELS_FOLDER, MODELS_VARIABLE, config_path
from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.settings import presets_of
from dsmoe_local.cli.command import define_command
from dsmoe_local.cli.commands import COMMANDS, load_command, no_such_command
from dsmoe_local.cli.model_argument import models_folder
from dsmoe_local.cli.option_sources import (
    ConfigDefaults,
    Origin,
    Source,
    config_file,
    origin_of,
    unknown_keys,
    unknown_variables,
)
from dsmoe_local.cli.options import FLAG, Option, configurable, json_option, option
from dsmoe_local.cli.output import console, plain_table, print_json, show_notes

_HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class Shown:
    """A line of the table: key and variable, the value as data and in words, its origin, what is wrong."""

    key: str
    variable: str
    value: Any
    words: str
    origin: Origin
    error: str = ""


def _complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the commands that begin with what is typed."""
    return [name for name in COMMANDS if name.startswith(incomplete)]


@define_command(
    "config",
    ("dsmoe config", "Show the options of dsmoe chat."),
    ("dsmoe config batch", "Show those of dsmoe batch."),
    ('$EDITOR "$(dsmoe config --path)"', "Edit the config file."),
)
@click.argument("name", metavar="[COMMAND]", default="chat", shell_complete=_complete)
@json_option()
@option("--path", "show_path", "Print the path of the config file.", FLAG, configurable=False)
def command(name: str, as_json: bool, show_path: bool) -> None:
    """Show the options of a command, their values, and the source of each value.

    The sources, strongest first: a flag; the variable of the option (DSMOE_TEMP for --temp); a preset; the
    section of the command in the config file; the top level of that file; the built-in value. Keys of the
    config file are long flags without dashes in front:

    \b
        model = "deepseek-moe-16b-chat-q4"
        models-folder = "~/models"
        [chat]
        temp = 0.6
        [presets.calm]
        temp = 0.1

    On the command line, --no-stats undoes a `stats` that is set elsewhere, and --history undoes `no-history`.
    In a chat, /set save also writes to the config file.
    """
    if name not in COMMANDS:
        raise no_such_command(name)
    if show_path:
        path = str(config_path())
        # Scripts get the exact bytes of the path.
        click.echo(safe_line(path, 4096) if sys.stdout.isatty() else os.fsencode(path))
        return
    values = config_file().values()
    presets = {preset: each.values for preset, each in presets_of(values).items()}
    shown = [_models_folder(), *options_of(name)]
    if as_json:
        print_json(_as_json(name, shown, presets), indent=2)
        return
    show_notes([*unknown_keys(values, COMMANDS), *unknown_variables(COMMANDS)])
    _show(shown, presets)


def options_of(name: str) -> list[Shown]:
    """Return every option of a command, with the value that it has if the command is run without flags."""
    command = load_command(name)
    context = click.Context(command, info_name=name, default_map=ConfigDefaults(command, quiet=True))
    with context:
        options = configurable(command)
        # --preset first: it gives values to others.
        for each in sorted(options, key=lambda each: not each.is_eager):
            _resolve(context, each)
        return [_shown(context, each) for each in options]


def _resolve(context: click.Context, each: Option) -> None:
    try:
        value, source = each.consume_value(context, {})
    except FormatError:
        # `_shown` reports it beside the option.
        value, source = None, ParameterSource.DEFAULT_MAP
    context.set_parameter_source(str(each.name), source)
    if each.name == "preset" and isinstance(value, str) and isinstance(context.default_map, ConfigDefaults):
        context.default_map.choose(value)


def _shown(context: click.Context, each: Option) -> Shown:
    key, name, origin = each.keys[0], each.variables[0], origin_of(context, str(each.name))
    try:
        raw, _ = each.consume_value(context, {})
    except FormatError as error:
        return Shown(key, name, None, "", origin, error.what)
    if origin.source is Source.BUILT_IN:
        value = _built_in(context, each)
        return Shown(key, name, value, each.default_words or _in_words(value), origin)
    if each.secret:
        return Shown(key, name, _HIDDEN, _HIDDEN, origin)
    try:
        value = each.type_cast_value(context, raw)
    except click.BadParameter as error:
        return Shown(key, name, None, _in_words(raw), origin, error.message)
    if isinstance(value, float) and not math.isfinite(value):
        return Shown(key, name, None, _in_words(raw), origin, "this is not a finite number")
    return Shown(key, name, _plain(value), _in_words(raw if not each.is_flag else value), origin)


def _built_in(context: click.Context, each: Option) -> Any:  # noqa: ANN401 - a JSON value
    default = each.get_default(context)
    if _plain(default) is None:
        if each.default_words.isdecimal():
            return int(each.default_words)
        return [] if each.multiple else None
    return _plain(each.type_cast_value(context, default))


def _models_folder() -> Shown:
    folder, origin = models_folder()
    return Shown(MODELS_FOLDER, MODELS_VARIABLE, str(folder), str(folder), origin)


def _plain(value: object) -> Any:  # noqa: ANN401 - a JSON value
    """Return a value as JSON can hold it; None for what it cannot hold."""
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path | date | time) else None


def _in_words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ", ".join(map(_in_words, value))
    return str(value) if isinstance(value, str | int | float | Path) else ""


def _as_json(name: str, shown: list[Shown], presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "command": name,
        "file": str(config_path()),
        "options": [
            {
                "key": each.key,
                "variable": each.variable,
                "value": each.value,
                "in_words": each.words or None,
                "source": each.origin.source.value,
                "where": each.origin.where or None,
                "error": each.error or None,
            }
            for each in shown
        ],
        "presets": {
            preset: {key: _plain(value) for key, value in section.items()}
            for preset, section in presets.items()
        },
    }


def _show(shown: list[Shown], presets: Iterable[str]) -> None:
    from rich.text import Text

    out, table = console(file_columns=160), plain_table()
    for heading, fixed in (("option", True), ("value", False), ("from", False)):
        table.add_column(heading, no_wrap=fixed, overflow="fold")
    for each in shown:
        built_in = each.origin.source is Source.BUILT_IN
        value = Text(safe_line(each.words), style="dim" if built_in else "bold")
        if each.error:
            value.append(f"  {safe_line(each.error)}", style="red")
        # The path of the file is printed once, below the table.
        where = "built-in" if built_in else each.origin.where.replace(f"{config_path()}:", "config file:")
        table.add_row(each.key, value, Text(safe_line(where), style="dim" if built_in else ""))
    out.print(table)
    if presets:
        out.print(Text(f"presets: {', '.join(safe_line(name, 40) for name in presets)}"))
    out.print(Text(f"config file: {safe_line(str(config_path()))}"), soft_wrap=True)
