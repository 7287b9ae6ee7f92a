"""Options about replies, made from the table of settings, for every command that generates text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import click

from dsmoe_local.chat.settings import SETTINGS, ChatSettings, apply, as_value
from dsmoe_local.cli.option_sources import choose_preset, complete_preset, source_in_errors
from dsmoe_local.cli.options import Group, all_of, option, text_value

F = TypeVar("F", bound=Callable[..., Any])

_BUILT_IN = ChatSettings()
_MAIN = frozenset({"max_tokens", "temperature"})
_CHAT_ONLY = frozenset({"on_full", "think"})


def setting_option(name: str, group: Group) -> Callable[[F], F]:
    """Return a decorator that adds the option of a setting, under the setting's name."""
    setting = SETTINGS[name]
    text = f"{setting.help[0].upper()}{setting.help[1:]}."
    default = as_value(_BUILT_IN, name)
    attributes: dict[str, Any] = {"default": default, "type": type(default), "metavar": setting.metavar}
    if isinstance(default, list):
        attributes = {"multiple": True, "metavar": setting.metavar}
        text += " Repeatable."
    elif setting.name == "chat_template_kwargs":
        attributes |= {"show_default": False, "table": True}
    elif isinstance(default, str):
        attributes = {"default": default, "type": click.Choice([str(word) for word in setting.words])}
    elif isinstance(default, float):
        attributes["show_default"] = f"{default:g}"
    return option(", ".join(setting.flags), name, text, attributes, group)


reply_options: Callable[[F], F] = all_of(
    *(
        setting_option(name, Group.MAIN if name in _MAIN else Group.SAMPLING)
        for name in SETTINGS
        if name not in _CHAT_ONLY
    ),
    option(
        "--preset",
        "preset",
        "Use the settings that /set save NAME stored in a chat; flags override them.",
        text_value("NAME"),
        Group.SAMPLING,
        is_eager=True,
        expose_value=False,
        callback=choose_preset,
        shell_complete=complete_preset,
    ),
)
"""Adds the options about replies to a command."""


def reply_settings(values: dict[str, Any]) -> ChatSettings:
    """Return the settings that the options give, and remove them from `values`. UsageError out of range."""
    settings = _BUILT_IN
    for name in SETTINGS:
        if name in values:
            value = values.pop(name)
            with source_in_errors(name, SETTINGS[name].flags[0]):
                settings = apply(settings, {name: list(value) if isinstance(value, tuple) else value})
    return replace(settings, chosen=frozenset())
