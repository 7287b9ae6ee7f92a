"""Settings that are stored with a session, and restored when it is continued."""

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
    """Restores the settings that /set changed in a session, on top of the chat's own (`base`).

    The settings named in `fixed` come from the command line. They replace stored ones, until /set changes
    them, and are not stored.
    """

    def __init__(self, base: ChatSettings, fixed: Set[str] = frozenset()) -> None:
        self._base = base
        self._fixed = frozenset(fixed)
        self._overridden: dict[str, Value] = {}

    def to_keep(self, settings: ChatSettings) -> dict[str, Value]:
        """Return the settings to store with the session, by the keys of the config file."""
        self._fixed -= settings.chosen
        chosen = {SETTINGS[name].key: as_value(settings, name) for name in settings.chosen}
        return self._overridden | chosen

    def leave(self) -> None:
        """Forget the stored settings of the session, for another one."""
        self._overridden = {}

    def restored(self, kept: Mapping[str, Value]) -> ChatSettings:
        """Return the settings of a session, given the stored ones. Unknown ones are kept as they are."""
        settings = replace(self._base, chosen=frozenset())
        for key, value in kept.items():
            try:
                name = setting_name(key)
                changed = apply(settings, {key: value})
            except UsageError:
                self._overridden[key] = value
                continue
            if name in self._fixed:
                self._overridden[key] = value
            else:
                settings = changed
        return settings


def differences(before: ChatSettings, after: ChatSettings) -> list[str]:
    """Return the settings that differ, each with its new value, as text."""
    return [
        f"{name} {in_words(after, name)}"
        for name in SETTINGS
        if get_setting(before, name) != get_setting(after, name)
    ]
