"""The sources of option values, for all commands alike, and which of them gave a value.

The order is: flag, `DSMOE_*` variable, preset, the command's section of the config file, the top level of the
file, built-in value. click asks for flags and variables first, then for the `ConfigDefaults` of this module.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import click
from click.core import ParameterSource

from dsmoe_local.base.config_file import MODELS_FOLDER, MODELS_VARIABLE, ConfigFile, config_path, spellings
from dsmoe_local.base.errors import DsmoeError, FormatError, UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.commands import COMMANDS, load_command
from dsmoe_local.cli.options import VARIABLE_PREFIX, Option, configurable

# DSMOE_FAULT is for tests: see base.faults.
_OTHER_VARIABLES = frozenset({"DSMOE_DEBUG", "DSMOE_FAULT", MODELS_VARIABLE})


class Source(StrEnum):
    """What gave an option its value; the first ones override the later ones."""

    FLAG = "flag"
    VARIABLE = "variable"
    PRESET = "preset"
    CONFIG = "config"
    BUILT_IN = "built-in"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from; `where` is for people: `DSMOE_TEMP` or `config.toml: [chat] temp`."""

    source: Source
    where: str = ""


@dataclass(frozen=True, slots=True)
class _Section:
    """A section of the config file; the name of the top level is empty."""

    source: Source
    name: str
    values: Mapping[str, Any]

    def place(self, key: str) -> str:
        """Return the name of a value, for people."""
        return f"{config_path()}: {f'[{self.name}] ' if self.name else ''}{key}"


def config_file() -> ConfigFile:
    """Return the user's config file."""
    return ConfigFile(config_path())


class ConfigDefaults(dict[str, Any]):
    """The config file as the `default_map` of one click context.

    The file is read once, when click asks for the first value: help and completion work with a broken file.
    Unless `quiet`, unknown keys and variables are reported on stderr.
    """

    def __init__(self, command: click.Command, *, quiet: bool = False) -> None:
        super().__init__()
        self._command = str(command.name)
        # `dsmoe config` reports them itself, those of all commands.
        self._quiet = quiet or self._command == "config"
        self._options = {str(option.name): option for option in configurable(command)}
        self._sections: list[_Section] | None = None
        self._preset: str | None = None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - an option's raw value
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        section, key = found
        return _raw(self._options[name], section.values[key], section.place(key))

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - an option's raw value
        """Return a value as dict.get does, which does not call __getitem__."""
        try:
            return self[name]
        except KeyError:
            return default

    def origin(self, name: str) -> Origin | None:
        """Return where the file has the value of a parameter; None if it does not have one."""
        found = self._find(name)
        return None if found is None else Origin(found[0].source, found[0].place(found[1]))

    def choose(self, preset: str) -> None:
        """Let a preset override the rest of the file. The next lookup raises UsageError if it is unknown."""
        self._preset = preset
        if self._sections is not None:
            # The file itself named the preset, or `dsmoe config` did.
            self._sections.insert(0, _preset_section(preset))

    def _find(self, name: str) -> tuple[_Section, str] | None:
        context = click.get_current_context(silent=True)
        if name not in self._options or context is None or context.resilient_parsing:
            return None
        option = self._options[name]
        for section in self._read():
            for key in spellings(option.keys):
                # At the top level, `chat` may be a section: it is also a flag of two commands.
                is_section = isinstance(section.values.get(key), dict) and not option.table
                is_other = option.section_only or is_section
                if key in section.values and (section.name or not is_other):
                    return section, key
        return None

    def _read(self) -> list[_Section]:
        if self._sections is None:
            values = config_file().values()
            if not self._quiet:
                _report_unknown(values, self._command)
            own = values.get(self._command, {})
            self._sections = [
                _Section(Source.CONFIG, self._command, own if isinstance(own, dict) else {}),
                _Section(Source.CONFIG, "", values),
            ]
            if self._preset is not None:
                self._sections.insert(0, _preset_section(self._preset))
        return self._sections


def _preset_section(name: str) -> _Section:
    from dsmoe_local.chat.settings import PRESETS, presets_of

    presets = presets_of(config_file().values())
    if name in presets:
        return _Section(Source.PRESET, f"{PRESETS}.{name}", presets[name].values)
    near = difflib.get_close_matches(name, presets, n=1)
    remedy = (
        f"presets: {', '.join(safe_line(each, 40) for each in presets)}"
        if presets
        else "/set save NAME in a chat makes one"
    )
    with source_in_errors("preset"):
        raise UsageError(
            f"there is no preset {safe_line(name, 40)!r}",
            where=str(config_path()),
            remedy=f"did you mean {near[0]}?" if near else remedy,
        )


def _raw(option: Option, value: object, where: str) -> object:
    """Return a value of the file as text or flag, as the command line would give it."""
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise FormatError("this takes true or false", where=where)
    if option.table and isinstance(value, dict):
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise FormatError("this table has a date, a time, inf or nan in it", where=where) from error
    values = value if isinstance(value, list) and option.multiple else [value]
    if not all(_is_plain(each) for each in values):
        raise FormatError("this takes a text or a number", where=where)
    texts = tuple(str(each) for each in values)
    if "\0" in "".join(texts) and not option.multiple:
        # A command line cannot contain a NUL, and system calls raise ValueError for it.
        raise FormatError("this has a NUL in it", where=where)
    if isinstance(option.type, click.Path):
        # The shell expands ~ on the command line only.
        texts = tuple(os.path.expanduser(text) for text in texts)
    return texts if option.multiple else texts[0]


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _parameter(context: click.Context, name: str) -> click.Parameter:
    return next(each for each in context.command.params if each.name == name)


def origin_of(context: click.Context, name: str) -> Origin:
    """Return where the value of a parameter comes from."""
    source = context.get_parameter_source(name)
    defaults = context.default_map
    if source is ParameterSource.COMMANDLINE:
        return Origin(Source.FLAG)
    if source is ParameterSource.ENVIRONMENT:
        option = _parameter(context, name)
        names = option.variables if isinstance(option, Option) else ()
        return Origin(Source.VARIABLE, next((each for each in names if os.environ.get(each)), ""))
    if source is ParameterSource.DEFAULT_MAP and isinstance(defaults, ConfigDefaults):
        with context.scope(cleanup=False):
            return defaults.origin(name) or Origin(Source.CONFIG)
    return Origin(Source.BUILT_IN)


def from_command_line(name: str) -> bool:
    """Return True if the command line itself gave the parameter `name` of the running command.

    Such a value overrides conflicting options from a variable or the config file.
    """
    context = click.get_current_context(silent=True)
    return context is None or origin_of(context, name).source is Source.FLAG


def settle(values: Mapping[str, Any], *ways: tuple[str, ...]) -> dict[str, Any]:
    """Return `values` with one of several ways to say something; those from weaker sources become None.

    A way is a tuple of parameters that go together. UsageError if two ways come from equally strong sources.
    """
    context = click.get_current_context(silent=True)

    def origin(name: str) -> Origin:
        return Origin(Source.FLAG) if context is None else origin_of(context, name)

    def rank(given: tuple[Origin, str]) -> int:
        return list(Source).index(given[0].source)

    given = {}
    for way in ways:
        found = [(origin(name), name) for name in way if _is_given(values[name])]
        if found:
            given[way] = min(found, key=rank)
    strongest = min(map(rank, given.values()), default=0)
    chosen = {way: each for way, each in given.items() if rank(each) == strongest}
    if len(chosen) > 1:
        flags = " and ".join(flag_of(name) for _, name in chosen.values())
        where = " and ".join(filter(None, (each.where for each, _ in chosen.values())))
        raise UsageError(f"{flags} exclude each other", where=where, remedy="give one of them")
    dropped = {name for way in given.keys() - chosen.keys() for name in way}
    return {name: None if name in dropped else value for name, value in values.items()}


def _is_given(value: object) -> bool:
    # 0 is a value.
    return value is not None and value is not False


def flag_of(name: str) -> str:
    """Return the flag of a parameter of the running command: --json for as_json."""
    option = _parameter(click.get_current_context(), name)
    return next(each for each in option.opts if each.startswith("--"))


@contextmanager
def source_in_errors(name: str, flag: str = "") -> Iterator[None]:
    """Let a UsageError name the variable, key or `flag` that the value of the parameter `name` comes from."""
    try:
        yield
    except UsageError as error:
        context = click.get_current_context(silent=True)
        where = "" if context is None else origin_of(context, name).where or flag
        if not where:
            raise
        raise UsageError(error.what, where=f"from {where}", remedy=error.remedy) from error


def source_of_error(error: click.ClickException) -> str:
    """Return which variable or key gave the value that click refuses; empty if the command line did."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return ""
    where = origin_of(error.ctx, error.param.name).where if error.param.name else ""
    return f"from {where}" if where else ""


def choose_preset(context: click.Context, option: click.Parameter, preset: str | None) -> None:
    """Apply --preset, which click parses before the other options."""
    if preset is not None and isinstance(context.default_map, ConfigDefaults):
        context.default_map.choose(preset)


def complete_preset(context: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Return the presets that begin with `typed`."""
    from dsmoe_local.chat.settings import presets_of

    try:
        return [name for name in presets_of(config_file().values()) if name.startswith(typed)]
    except DsmoeError:
        return []


def _report_unknown(values: Mapping[str, Any], command: str) -> None:
    for note in unknown_keys(values, [command]):
        click.echo(f"note: {safe_line(str(config_path()))}: {note}", err=True)
    for note in unknown_variables([command]):
        click.echo(f"note: {note}", err=True)


def unknown_keys(values: Mapping[str, Any], commands: Iterable[str]) -> list[str]:
    """Return a message for each key of the config file that has no effect, in most cases a typing mistake.

    Of the sections of commands, only those of `commands` are checked.
    """
    from dsmoe_local.chat.settings import KEYS, PRESETS, presets_of

    def keys(names: Iterable[str]) -> set[str]:
        return {
            key
            for name in names
            for option in configurable(load_command(name))
            for key in spellings(option.keys)
        }

    notes: list[str] = []

    def check(section: Mapping[str, Any], known: set[str], name: str = "") -> None:
        place = f" in [{safe_line(name, 60)}]" if name else ""
        for key in section:
            if key not in known:
                hint = _did_you_mean(key.replace("_", "-"), known)
                notes.append(f"{safe_line(key, 40)!r}{place} is not an option{hint}")

    commands = list(commands)
    known = {*COMMANDS, PRESETS, *spellings([MODELS_FOLDER]), *keys(commands)}
    if not known.issuperset(values):
        # Importing all commands takes time; an unknown key is most often an option of another command.
        known |= keys(COMMANDS)
    check(values, known)
    for name in commands:
        section = values.get(name, {})
        if isinstance(section, dict):
            check(section, keys([name]), name)
        elif name not in keys(COMMANDS):
            notes.append(f"{name!r} is not a section: write [{name}]")
    for name, preset in presets_of(values).items():
        check(dict.fromkeys(preset.unknown), set(KEYS), f"{PRESETS}.{name}")
    return notes


def unknown_variables(commands: Iterable[str]) -> list[str]:
    """Return a message for each DSMOE_ variable that has no effect. All commands are checked if need be."""

    def variables(commands: Iterable[str]) -> set[str]:
        return {
            name
            for command in commands
            for option in configurable(load_command(command))
            for name in option.variables
        }

    named = {name for name in os.environ if name.startswith(VARIABLE_PREFIX)} - _OTHER_VARIABLES
    known = variables(commands)
    if not known.issuperset(named):
        known |= variables(COMMANDS)
    return [
        f"the variable {safe_line(name, 60)} is not an option{_did_you_mean(name, known)}"
        for name in sorted(named - known)
    ]


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
