"""Where options get their values from when the command line does not give them, for all commands alike.

The order: flag, `DSMOE_*` variable, preset, the command's section of the config file, the file's top level,
built-in. click asks for variables and defaults; this module tells it both, and says where a value came from.
"""

from __future__ import annotations

import copy
import difflib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsmoe_local.base.config_file import ConfigFile, config_path, spellings
from dsmoe_local.base.errors import DsmoeError, FormatError, UsageError
from dsmoe_local.base.paths import data_folder
from dsmoe_local.base.text import safe_line

MODELS_FOLDER = "models-folder"
VARIABLE_PREFIX = "DSMOE_"
# They say what this one run does; --debug is looked for before anything is parsed.
_FLAGS_ALONE = frozenset({"help", "version", "debug", "show_path"})

# At the top level, for all commands, this is the context of conversations, to these the window they measure;
# and a file that quantize reads, while eval would spend hours on writing it.
_OWN_SECTION_ALONE = {
    "eval": ("ctx-size", "sensitivity"),
    "imatrix": ("ctx-size",),
    "bench": ("ctx-size",),
}
# The usual variable is another command's, to which the option means something else.
_OWN_VARIABLE = {"eval": ("sensitivity",)}


class Source(StrEnum):
    """What gave an option its value, weakest last."""

    FLAG = "flag"
    VARIABLE = "variable"
    PRESET = "preset"
    CONFIG = "config"
    BUILT_IN = "built-in"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value comes from; `where` in words for people: `DSMOE_TEMP`, `config.toml: [chat] temp`."""

    source: Source
    where: str = ""


@dataclass(frozen=True, slots=True)
class _Layer:
    """A section of the config file."""

    source: Source
    name: str
    values: Mapping[str, Any]


def variable(key: str, command: str = "") -> str:
    """The variable of an option: DSMOE_CTX_SIZE for ctx-size; of some options of a command one of its own,
    DSMOE_EVAL_SENSITIVITY.
    """
    name = f"{command}_{key}" if key in _OWN_VARIABLE.get(command, ()) else key
    return f"{VARIABLE_PREFIX}{name.upper().replace('-', '_')}"


def keys_of(option: click.Parameter) -> list[str]:
    """The names of an option in the config file: its long flags, the usual one first."""
    return [flag.removeprefix("--") for flag in option.opts if flag.startswith("--")]


def configurable(command: click.Command) -> list[click.Option]:
    """The options that variables and the config file can give."""
    options = [each for each in command.params if isinstance(each, click.Option)]
    return [each for each in options if each.name not in _FLAGS_ALONE and keys_of(each)]


def attach(command: click.Command, name: str) -> None:
    """Let variables and the config file speak for the options of the command called `name`."""
    if isinstance(command.context_settings.get("default_map"), ConfigDefaults):
        return
    for option in configurable(command):
        option.envvar = [variable(key, name) for key in keys_of(option)]
        if option.multiple:
            option.type = _one_a_line(option.type)
        if option.is_bool_flag and not option.secondary_opts:
            _make_deniable(option)
    # `config` tells of all keys that mean nothing, by itself.
    command.context_settings["default_map"] = ConfigDefaults(command, name, quiet=name == "config")


def _make_deniable(option: click.Option) -> None:
    """Let the command line take back a flag that a variable or the file gives: --no-stats, --history. Help
    does not list it: that of `config` says it for all.
    """
    denials = [
        f"--{key.removeprefix('no-')}" if key.startswith("no-") else f"--no-{key}" for key in keys_of(option)
    ]
    get_help_record = option.get_help_record

    def without_denials(ctx: click.Context) -> tuple[str, str] | None:
        option.secondary_opts = []
        try:
            return get_help_record(ctx)
        finally:
            option.secondary_opts = denials

    option.secondary_opts = denials
    vars(option)["get_help_record"] = without_denials


def _one_a_line(kind: click.ParamType[Any]) -> click.ParamType[Any]:
    """`kind`, taking a variable's lines for several values; click takes its words, but texts have spaces."""
    kind = copy.copy(kind)
    vars(kind)["envvar_list_splitter"] = "\n"
    return kind


def config_file() -> ConfigFile:
    """The user's config file."""
    return ConfigFile(config_path())


def models_folder() -> Path:
    """Where models are looked for by name: the variable's folder, the config file's, or the usual one."""
    named = os.environ.get(variable(MODELS_FOLDER)) or _configured_folder()
    if named is not None and (not isinstance(named, str) or "\0" in named):
        raise FormatError("this takes the path of a folder", where=f"{config_path()}: {MODELS_FOLDER}")
    return Path(os.path.expanduser(named)) if named else data_folder() / "models"


def _configured_folder() -> Any:  # noqa: ANN401 - a value of the file
    values = config_file().values()
    return next((values[key] for key in spellings([MODELS_FOLDER]) if key in values), None)


def models_folder_origin() -> Origin:
    """What says where the models folder is."""
    if os.environ.get(variable(MODELS_FOLDER)):
        return Origin(Source.VARIABLE, variable(MODELS_FOLDER))
    if _configured_folder():
        return Origin(Source.CONFIG, f"{config_path()}: {MODELS_FOLDER}")
    return Origin(Source.BUILT_IN)


class ConfigDefaults(dict[str, Any]):
    """The config file as click's `default_map` of one command. Nothing is read for --help or completion, and
    the file once for each run. Unless `quiet`, a note tells of keys that mean nothing.
    """

    def __init__(self, command: click.Command, name: str, *, quiet: bool = False) -> None:
        super().__init__()
        self.command_name = name
        self._quiet = quiet
        self._options = {option.name: option for option in configurable(command)}
        self._context: click.Context | None = None
        self._layers: list[_Layer] = []
        self._preset: tuple[click.Context, str] | None = None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - an option's raw value
        found = self._find(name)
        if found is None:
            raise KeyError(name)
        layer, key = found
        return _raw(self._options[name], layer.values[key], _where(layer, key))

    def get(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - an option's raw value
        """See dict.get, which does not ask __getitem__."""
        try:
            return self[name]
        except KeyError:
            return default

    def origin(self, name: str) -> Origin | None:
        """Where the value of the option called `name` stands in the file; None if it does not."""
        found = self._find(name)
        return None if found is None else Origin(found[0].source, _where(*found))

    def choose(self, preset: str) -> None:
        """Let a preset speak before the rest of the file. If it is not there, the first option that is asked
        for raises UsageError: nothing is read for a --help behind it.
        """
        context = click.get_current_context()
        self._preset = context, preset
        if self._context is context:
            # The file named it itself.
            self._layers.insert(0, _preset_layer(preset))

    def _find(self, name: str) -> tuple[_Layer, str] | None:
        context = click.get_current_context(silent=True)
        if name not in self._options or context is None or context.resilient_parsing:
            return None
        keys = keys_of(self._options[name])
        is_own = keys[0] in _OWN_SECTION_ALONE.get(self.command_name, ())
        for layer in self._current_layers():
            for key in spellings(keys):
                # `chat` is a flag of two commands, and the section of a third.
                is_other = is_own or isinstance(layer.values.get(key), dict)
                if key in layer.values and (layer.name or not is_other):
                    return layer, key
        return None

    def _current_layers(self) -> list[_Layer]:
        context = click.get_current_context()
        if self._context is not context:
            self._context, self._layers = context, self._read()
            if self._preset is not None and self._preset[0] is context:
                self._layers.insert(0, _preset_layer(self._preset[1]))
        return self._layers

    def _read(self) -> list[_Layer]:
        values = config_file().values()
        if not self._quiet:
            from dsmoe_local.cli.unknown import unknown_keys, unknown_variables

            for note in unknown_keys(values, [self.command_name]):
                click.echo(f"note: {safe_line(str(config_path()))}: {note}", err=True)
            for note in unknown_variables([self.command_name]):
                click.echo(f"note: {note}", err=True)
        section = values.get(self.command_name, {})
        if not isinstance(section, dict):
            section = {}
        return [_Layer(Source.CONFIG, self.command_name, section), _Layer(Source.CONFIG, "", values)]


def _preset_layer(name: str) -> _Layer:
    """UsageError for a preset that is not there."""
    from dsmoe_local.chat.settings import PRESETS, presets_of

    presets = presets_of(config_file().values())
    if name in presets:
        return _Layer(Source.PRESET, f"{PRESETS}.{name}", presets[name].values)
    near = difflib.get_close_matches(name, presets, n=1)
    remedy = (
        f"there are: {', '.join(map(safe_line, presets))}"
        if presets
        else "/set save NAME in a chat makes one"
    )
    with told_origin("preset"):
        raise UsageError(
            f"there is no preset {safe_line(name, 40)!r}",
            where=str(config_path()),
            remedy=f"did you mean {near[0]}?" if near else remedy,
        )


def _where(layer: _Layer, key: str) -> str:
    return f"{config_path()}: {f'[{layer.name}] ' if layer.name else ''}{key}"


def _raw(option: click.Option, value: object, where: str) -> object:
    """A value of the file as the command line would give it: click's types read texts."""
    if option.is_flag:
        if isinstance(value, bool):
            return value
        raise FormatError("this takes true or false", where=where)
    values = value if isinstance(value, list) and option.multiple else [value]
    if not all(_is_plain(each) for each in values):
        raise FormatError("this takes a text or a number", where=where)
    texts = tuple(str(each) for each in values)
    if "\0" in "".join(texts) and not option.multiple:
        # As the command line could not; system calls would raise errors of their own.
        raise FormatError("this has a NUL in it", where=where)
    if isinstance(option.type, click.Path):
        # No shell has seen it.
        texts = tuple(os.path.expanduser(text) for text in texts)
    return texts if option.multiple else texts[0]


def _is_plain(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def origin_of(context: click.Context, name: str) -> Origin:
    """Where a parameter's value comes from."""
    source = context.get_parameter_source(name)
    defaults = context.default_map
    if source is ParameterSource.COMMANDLINE:
        return Origin(Source.FLAG)
    if source is ParameterSource.ENVIRONMENT:
        option = next(each for each in context.command.params if each.name == name)
        names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or ()
        return Origin(Source.VARIABLE, next((each for each in names if os.environ.get(each)), ""))
    if source is ParameterSource.DEFAULT_MAP and isinstance(defaults, ConfigDefaults):
        with context.scope(cleanup=False):
            return defaults.origin(name) or Origin(Source.CONFIG)
    return Origin(Source.BUILT_IN)


def from_command_line(name: str) -> bool:
    """Whether the running command got its parameter `name` on the command line, which outweighs other
    options that come from elsewhere.
    """
    context = click.get_current_context(silent=True)
    return context is None or origin_of(context, name).source is Source.FLAG


@contextmanager
def told_origin(name: str) -> Iterator[None]:
    """Let a UsageError about the parameter `name` say which variable or key of the file its value is from."""
    try:
        yield
    except UsageError as error:
        context = click.get_current_context(silent=True)
        where = "" if context is None else origin_of(context, name).where
        if not where:
            raise
        raise UsageError(error.what, where=f"from {where}", remedy=error.remedy) from error


def where_from(error: click.ClickException) -> str:
    """The variable or place in the file whose value click refuses; empty if it was the command line's."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return ""
    where = origin_of(error.ctx, error.param.name).where if error.param.name else ""
    return f"from {where}" if where else ""


def choose_preset(context: click.Context, option: click.Parameter, preset: str | None) -> None:
    """What --preset does when it is parsed, before the other options are."""
    if preset is not None and isinstance(context.default_map, ConfigDefaults):
        context.default_map.choose(preset)


def complete_preset(context: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """The presets that begin like this."""
    from dsmoe_local.chat.settings import presets_of

    try:
        return [name for name in presets_of(config_file().values()) if name.startswith(typed)]
    except DsmoeError:
        return []
