"""Option: a click option that is also a variable, a key of the config file and a line in a group of the help.

Everything that is true of an option is said where it is declared. `option_sources` reads variables and the
config file, `command` writes the help page and `config` shows the values in force, all from the declaration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import click

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line

F = TypeVar("F", bound=Callable[..., Any])

VARIABLE_PREFIX = "DSMOE_"

_NUMBERS = (click.types.IntParamType, click.types.FloatParamType)


class Group(StrEnum):
    """Headings of options in the help of a command, in the order in which they are shown."""

    MAIN = "Options"
    CONVERSATION = "Conversation"
    ANSWER = "One answer"
    INPUT = "Input"
    OUTPUT = "Output"
    ACCESS = "Access"
    LIMITS = "Limits"
    TYPES = "Types of single tensors"
    TARGET = "Types for a target"
    CALIBRATION = "Calibrated rounding"
    SENSITIVITY = "Sensitivity"
    SAMPLING = "Sampling"
    CLUSTER = "Ray cluster"
    DEVICES = "Memory and devices"
    ADVANCED = "Advanced"


class Option(click.Option):
    """An option with a long flag.

    `configurable`: variables and the config file can give it. `section_only`: the config file can give it in
    the section of the command only, not at the top level. `secret`: `dsmoe config` hides the value. `table`:
    the value is JSON, and the config file may also have it as a table.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        group: Group = Group.MAIN,
        configurable: bool = True,
        section_only: bool = False,
        secret: bool = False,
        table: bool = False,
        **attributes: Any,  # noqa: ANN401 - click's own
    ) -> None:
        super().__init__(flags, **attributes)
        self.group = group
        self.configurable = configurable
        self.section_only = section_only
        self.secret = secret
        self.table = table
        if not configurable:
            return
        if self.envvar is None:
            self.envvar = [variable(key) for key in self.keys]
        if self.is_bool_flag:
            # The command line can undo a flag that a variable or the config file sets.
            self.secondary_opts = [
                f"--{key.removeprefix('no-')}" if key.startswith("no-") else f"--no-{key}"
                for key in self.keys
            ]

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys in the config file: the long flags without dashes. The first one is the usual one."""
        return tuple(flag.removeprefix("--") for flag in self.opts if flag.startswith("--"))

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of the environment variables; the first one is the usual one."""
        if self.envvar is None or isinstance(self.envvar, str):
            return (self.envvar,) if self.envvar else ()
        return tuple(self.envvar)

    @property
    def default_words(self) -> str:
        """The built-in value in words; empty if the declaration has none."""
        return self.show_default if isinstance(self.show_default, str) else ""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the line of the help, without the flags that undo this one."""
        undoing, self.secondary_opts = self.secondary_opts, []
        try:
            return super().get_help_record(ctx)
        finally:
            self.secondary_opts = undoing

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        """Return what stands in brackets: the default as it is declared. Ranges are left to the text."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        if self.default_words:
            extra["default"] = self.default_words
        return extra

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:  # noqa: ANN401 - a raw value
        """Convert and check a value. The error for a wrong number says what to write."""
        try:
            found = super().type_cast_value(ctx, value)
        except click.BadParameter as error:
            if isinstance(self.type, _NUMBERS):
                raise click.BadParameter(self._wrong_number(ctx, str(value)), ctx, self) from error
            raise
        if isinstance(found, float) and math.isnan(found):
            # No range of click's excludes it.
            raise click.BadParameter(self._wrong_number(ctx, str(value)), ctx, self)
        return found

    def _wrong_number(self, ctx: click.Context, text: str) -> str:
        """Return why a text cannot be the value of this option, which takes a number."""
        is_whole = isinstance(self.type, click.types.IntParamType)
        kind = "whole number" if is_whole else "number"
        if any(text in parameter.opts for parameter in ctx.command.params):
            return f"a {kind} is missing before {text}"
        shown = safe_line(text, 40)
        if isinstance(self.type, click.IntRange | click.FloatRange):
            with suppress(ValueError):
                (int if is_whole else float)(text)
                least, most = self.type.min, self.type.max
                allowed = f"{least} or more" if most is None else f"{least} to {most}"
                return f"{shown} is out of range: write {allowed}"
        if is_whole and (thousands := re.fullmatch(r"(\d{1,6})k", text.strip().lower())):
            return f"{shown!r} is not a {kind}: write {1024 * int(thousands[1])}"
        example = f", such as {self.default:g}" if isinstance(self.default, float) else ""
        return f"{shown!r} is not a {kind}{example}"

    def value_from_envvar(self, ctx: click.Context) -> Any:  # noqa: ANN401 - a raw value
        """Return the variable's value; of an option that may be repeated, each line is a value."""
        text = self.resolve_envvar_value(ctx)
        if text is not None and self.multiple:
            # click splits at every space, but texts and paths contain spaces.
            return text.split("\n")
        return super().value_from_envvar(ctx)


def variable(key: str) -> str:
    """Return the environment variable of a key: DSMOE_CTX_SIZE for ctx-size."""
    return f"{VARIABLE_PREFIX}{key.upper().replace('-', '_')}"


Kind = Mapping[str, Any]
"""What the value of an option is, as attributes of click's Option."""

FLAG: Kind = {"is_flag": True}
NUMBER: Kind = {"type": int, "metavar": "N"}
COUNT: Kind = {"type": click.IntRange(1), "metavar": "N"}
TEXT: Kind = {"metavar": "TEXT"}


def text_value(metavar: str) -> Kind:
    """Return the kind of an option whose value is a text."""
    return {"metavar": metavar}


def path_value(metavar: str) -> Kind:
    """Return the kind of an option whose value is the path of a file or folder."""
    return {"type": click.Path(path_type=Path), "metavar": metavar}


FILE = path_value("FILE")


def choice(*words: str) -> Kind:
    """Return the kind of an option whose value is one of some words."""
    return {"type": click.Choice(words)}


def typed(kind: click.ParamType[Any], metavar: str) -> Kind:
    """Return the kind of an option with values of a type of click's."""
    return {"type": kind, "metavar": metavar}


def parsed(parse: Callable[[str], Any], metavar: str) -> Kind:
    """Return the kind of an option whose values a function parses.

    Its ValueErrors and UsageErrors are shown to users.
    """
    return {"type": _Parsed(parse), "metavar": metavar}


class _Parsed(click.ParamType[Any]):
    name = "text"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self._parse = parse

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Any:  # noqa: ANN401
        """Parse a text; other values are parsed already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        except UsageError as error:
            self.fail(f"{error.what}: {error.remedy}", param, ctx)


def option(
    flags: str,
    name: str,
    text: str,
    kind: Kind = TEXT,
    group: Group = Group.MAIN,
    *,
    shown: str | None = None,
    **attributes: Any,  # noqa: ANN401 - click's own
) -> Callable[[F], F]:
    """Return a decorator that adds an `Option` to a command, as the parameter `name`.

    `flags` are separated by commas, the usual long one first. `text` is the line in the help. `shown` is the
    default in words, for options whose default is computed later.
    """
    if shown is not None:
        attributes["show_default"] = shown
    return click.option(
        *flags.split(", "), name, cls=Option, group=group, help=text, **{**kind, **attributes}
    )


def all_of(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return a decorator that adds several options to a command, in the order given."""

    def add(function: F) -> F:
        for each in reversed(options):
            function = each(function)
        return function

    return add


def json_option(text: str = "Print one JSON object.", group: Group = Group.MAIN) -> Callable[[F], F]:
    """Return a decorator that adds --json, as `as_json`."""
    return option("--json", "as_json", text, FLAG, group=group)


def configurable(command: click.Command) -> list[Option]:
    """Return the options of a command that variables and the config file can give."""
    return [each for each in command.params if isinstance(each, Option) and each.configurable]
