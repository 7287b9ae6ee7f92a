"""What stands in the config file or the environment, looks like an option, and is none."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Any

from dsmoe_local.base.config_file import spellings
from dsmoe_local.base.text import safe_line
from dsmoe_local.cli.commands import COMMANDS, import_command
from dsmoe_local.cli.configuration import MODELS_FOLDER, VARIABLE_PREFIX, configurable, keys_of, variable

# DSMOE_FAULT is base.faults'.
_OTHER_VARIABLES = frozenset({"DSMOE_DEBUG", "DSMOE_FAULT", variable(MODELS_FOLDER)})


def unknown_keys(values: Mapping[str, Any], commands: Iterable[str]) -> list[str]:
    """What stands in the config file and means nothing, in words. Of the commands' sections only those of
    `commands` are looked at.
    """
    from dsmoe_local.chat.settings import KEYS, PRESETS, presets_of

    def keys(names: Iterable[str]) -> set[str]:
        return {
            key
            for name in names
            for option in configurable(import_command(name))
            for key in spellings(keys_of(option))
        }

    notes: list[str] = []

    def check(section: Mapping[str, Any], known: set[str], name: str = "") -> None:
        for key in section:
            if key not in known:
                near = difflib.get_close_matches(key.replace("_", "-"), sorted(known), n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                place = f" in [{safe_line(name, 60)}]" if name else ""
                notes.append(f"{safe_line(key, 40)!r}{place} is no option{hint}")

    commands = list(commands)
    known = {*COMMANDS, PRESETS, *spellings([MODELS_FOLDER]), *keys(commands)}
    if not known.issuperset(values):
        # Most often an option of another command.
        known |= keys(COMMANDS)
    check(values, known)
    for name in commands:
        section = values.get(name, {})
        if isinstance(section, dict):
            check(section, keys([name]), name)
        elif name not in keys(COMMANDS):
            notes.append(f"{name!r} is no section: write [{name}]")
    for name, preset in presets_of(values).items():
        check(dict.fromkeys(preset.unknown), set(KEYS), f"{PRESETS}.{name}")
    return notes


def unknown_variables(commands: Iterable[str]) -> list[str]:
    """Variables that look like ours and mean nothing, in words. Commands beside `commands` are looked at only
    if need be.
    """

    def variables(commands: Iterable[str]) -> set[str]:
        return {
            variable(key, command)
            for command in commands
            for option in configurable(import_command(command))
            for key in keys_of(option)
        }

    named = {name for name in os.environ if name.startswith(VARIABLE_PREFIX)} - _OTHER_VARIABLES
    known = variables(commands)
    if not known.issuperset(named):
        known |= variables(COMMANDS)
    notes = []
    for name in sorted(named - known):
        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        notes.append(f"the variable {safe_line(name, 60)} is no option's{hint}")
    return notes
