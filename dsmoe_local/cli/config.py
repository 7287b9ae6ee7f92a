"""`dsmoe config`: every option, its value and where that comes from. `configuration` knows; this shows."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from dsmoe_local.base.config_file import config_path
from dsmoe_local.base.errors import FormatError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.configuration import (
    MODELS_FOLDER,
    ConfigDefaults,
    Origin,
    Source,
    config_file,
    configurable,
    keys_of,
    models_folder,
    models_folder_origin,
    origin_of,
    variable,
)
from dsmoe_local.cli.unknown import unknown_keys, unknown_variables

# The help of an option ends with its built-in value, in words.
_BUILT_IN = re.compile(r"\[(?:default: )?([^\[\]]+)\]\.?$")
_SECRET = frozenset({"token"})
_HIDDEN = "(hidden)"


@dataclass(frozen=True, slots=True)
class Shown:
    """An option: its key in the config file, its value as data and in words, and where it comes from."""

    key: str
    value: Any
    words: str
    origin: Origin
    error: str = ""


class CommandName(click.ParamType[str]):
    """A subcommand that has options."""

    name = "COMMAND"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """UsageError for a word that is none."""
        from dsmoe_local.cli.commands import COMMANDS, no_such_command

        if value not in COMMANDS:
            raise no_such_command(str(value))
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The commands that begin like this."""
        from dsmoe_local.cli.commands import COMMANDS

        return [CompletionItem(name) for name in COMMANDS if name.startswith(incomplete)]


@click.command(name="config")
@click.argument("name", metavar="[COMMAND]", default="chat", type=CommandName())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--path", "show_path", is_flag=True, help="Print where the config file is.")
def command(name: str, as_json: bool, show_path: bool) -> None:
    """Show the options of a command (chat, if none is named), their values and where these come from.

    A flag counts most, then the variable of the option (DSMOE_TEMP for --temp), then a preset, then the
    config file: the command's section, then the top level. Its keys are long flags, without the two dashes:

    \b
        model = "deepseek-moe-16b-chat-q4"
        models-folder = "~/models"
        [chat]
        temp = 0.6
        [presets.calm]
        temp = 0.1

    A flag that one of them sets is taken back on the command line: --no-stats, or --history for no-history.

    $EDITOR "$(dsmoe config --path)" changes it, as does /set save in a chat.
    """
    if show_path:
        path = str(config_path())
        # A script gets the very bytes of the name.
        click.echo(safe_line(path, 4096) if sys.stdout.isatty() else os.fsencode(path))
        return
    from dsmoe_local.chat.settings import presets_of
    from dsmoe_local.cli.commands import COMMANDS

    values = config_file().values()
    presets = {preset: each.values for preset, each in presets_of(values).items()}
    shown = [_models_folder(), *options_of(name)]
    if as_json:
        found = _as_json(name, shown, presets)
        click.echo(json.dumps(found, indent=2, ensure_ascii=True, allow_nan=False))
        return
    for note in (*unknown_keys(values, COMMANDS), *unknown_variables(COMMANDS)):
        click.echo(f"note: {note}", err=True)
    _show(shown, presets)


def options_of(name: str) -> list[Shown]:
    """Every option of a command, as it would be if the command ran now without flags."""
    from dsmoe_local.cli.main import load_command

    command = load_command(name)
    defaults = ConfigDefaults(command, name, quiet=True)
    context = click.Context(command, info_name=name, default_map=defaults)
    with context:
        options = configurable(command)
        # The preset first: it speaks for others.
        for option in sorted(options, key=lambda option: not option.is_eager):
            _resolve(context, option)
        return [_shown(context, option) for option in options]


def _resolve(context: click.Context, option: click.Option) -> None:
    try:
        value, source = option.consume_value(context, {})
    except FormatError:
        # It is told beside the option.
        value, source = None, ParameterSource.DEFAULT_MAP
    context.set_parameter_source(str(option.name), source)
    if option.name == "preset" and isinstance(value, str) and isinstance(context.default_map, ConfigDefaults):
        context.default_map.choose(value)


def _shown(context: click.Context, option: click.Option) -> Shown:
    key, origin = keys_of(option)[0], origin_of(context, str(option.name))
    try:
        raw, _ = option.consume_value(context, {})
    except FormatError as error:
        return Shown(key, None, "", origin, error.what)
    if key in _SECRET and origin.source is not Source.BUILT_IN:
        return Shown(key, _HIDDEN, _HIDDEN, origin)
    if origin.source is Source.BUILT_IN:
        return _built_in(context, option)
    try:
        value = option.type_cast_value(context, raw)
    except click.BadParameter as error:
        return Shown(key, None, _in_words(raw), origin, error.message)
    if isinstance(value, float) and not math.isfinite(value):
        return Shown(key, None, _in_words(raw), origin, "this is not a finite number")
    return Shown(key, _plain(value), _in_words(raw if not option.is_flag else value), origin)


def _built_in(context: click.Context, option: click.Option) -> Shown:
    found = _BUILT_IN.search(option.help or "")
    default = option.get_default(context)
    value: Any = [] if option.multiple else None
    if _plain(default) is not None:
        value = _plain(option.type_cast_value(context, default))
    words = found[1] if found else _in_words(value)
    if value is None and words.isdecimal():
        # The module that knows it is imported only where it is needed.
        value = int(words)
    return Shown(keys_of(option)[0], value, words, Origin(Source.BUILT_IN))


def _models_folder() -> Shown:
    folder = str(models_folder())
    return Shown(MODELS_FOLDER, folder, folder, models_folder_origin())


def _plain(value: object) -> Any:  # noqa: ANN401 - a JSON value
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
                "variable": variable(each.key, name),
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
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, fixed in (("option", True), ("value", False), ("from", False)):
        table.add_column(heading, no_wrap=fixed, overflow="fold")
    for each in shown:
        built_in = each.origin.source is Source.BUILT_IN
        value = Text(safe_line(each.words), style="dim" if built_in else "bold")
        if each.error:
            value.append(f"  {safe_line(each.error)}", style="red")
        # The file is named once, below.
        where = "built-in" if built_in else each.origin.where.replace(f"{config_path()}:", "config file:")
        table.add_row(each.key, value, Text(safe_line(where), style="dim" if built_in else ""))
    console.print(table)
    if presets:
        console.print(Text(f"presets: {', '.join(safe_line(name, 40) for name in presets)}"))
    console.print(Text(f"config file: {safe_line(str(config_path()))}"), soft_wrap=True)
