"""The settings of a session: what /set chose in it, kept with it, and what of that holds when it goes on."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

from dsmoe_local.base.config_file import Value
from dsmoe_local.base.errors import UsageError
from dsmoe_local.chat.settings import (
    SETTINGS,
    ChatSettings,
    apply,
    as_value,
    get_setting,
    in_words,
    setting_name,
)


class SessionSettings:
    """What a chat begins with, `base`, and which of these the command line gave: `fixed`, by name. Those
    outweigh what a session was held with, until /set changes them, and are of this run alone.
    """

    def __init__(self, base: ChatSettings, fixed: Set[str] = frozenset()) -> None:
        self._base = base
        self._fixed = frozenset(fixed)
        self._outweighed: dict[str, Value] = {}

    def to_keep(self, settings: ChatSettings) -> dict[str, Value]:
        """What is stored with the session, by the keys of the config file."""
        self._fixed -= settings.chosen
        chosen = {SETTINGS[name].key: as_value(settings, name) for name in settings.chosen}
        return self._outweighed | chosen

    def leave(self) -> None:
        """Another session goes on, or a new one."""
        self._outweighed = {}

    def restored(self, kept: Mapping[str, Value]) -> ChatSettings:
        """The settings of the session that goes on. What this version cannot read stays as it was kept."""
        settings = replace(self._base, chosen=frozenset())
        for key, value in kept.items():
            try:
                name = setting_name(key)
                changed = apply(settings, {key: value})
            except UsageError:
                self._outweighed[key] = value
                continue
            if name in self._fixed:
                self._outweighed[key] = value
            else:
                settings = changed
        return settings


def differences(before: ChatSettings, after: ChatSettings) -> list[str]:
    """The settings that differ, each with its new value, in words."""
    return [
        f"{name} {in_words(after, name)}"
        for name in SETTINGS
        if get_setting(before, name) != get_setting(after, name)
    ]
