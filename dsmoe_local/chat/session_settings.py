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
    """Restores the settings that /set changed in a session; the others are those of `base`.

    The settings named in `fixed` come from the command line. They override stored ones until /set changes
    them, and are not stored themselves.
    """

    def __init__(self, base: ChatSettings, fixed: Set[str] = frozenset()) -> None:
        self._base = base
        self._fixed = frozenset(fixed)
        # Stored settings that are not in use, but are stored again: overridden or unknown ones.
        self._unused: dict[str, Value] = {}

    def to_store(self, settings: ChatSettings) -> dict[str, Value]:
        """Return the settings to store with the session, by the keys of the config file."""
        self._fixed -= settings.chosen
        chosen = {SETTINGS[name].key: as_value(settings, name) for name in settings.chosen}
        return self._unused | chosen

    def forget_session(self) -> None:
        """Forget the stored settings of the current session. Must be called before another one is opened."""
        self._unused = {}

    def restored(self, stored: Mapping[str, Value]) -> ChatSettings:
        """Return the settings of a session, given its stored ones. Unknown stored settings are kept."""
        settings = replace(self._base, chosen=frozenset())
        for key, value in stored.items():
            try:
                name = setting_name(key)
                changed = apply(settings, {key: value})
            except UsageError:
                self._unused[key] = value
                continue
            if name in self._fixed:
                self._unused[key] = value
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
