"""/set: shows and changes settings, and stores them in the config file as defaults or presets."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from rich.text import Text

from dsmoe_local.base.config_file import Value, spellings
from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.base.text import safe_line, safe_text
from dsmoe_local.chat import notices
from dsmoe_local.chat.commands.declare import Chat, Command, Commands
from dsmoe_local.chat.session_settings import differences
from dsmoe_local.chat.settings import (
    PRESETS,
    SETTINGS,
    ChatSettings,
    OnFull,
    Preset,
    Think,
    apply,
    as_value,
    change,
    get_setting,
    in_words,
    presets_of,
    setting_name,
    setting_rows,
)
from dsmoe_local.chat.turns import Role
from dsmoe_local.engine.reasoning import markers_in

_DEFAULTS = ChatSettings(chosen=frozenset(SETTINGS))
_SECTION = "chat"
_SET_FIRST = "change a setting first: /set NAME VALUE"
_PRESET_NAME = re.compile(r"[\w.+-]{1,40}")


def _set(chat: Chat, argument: str) -> None:
    word, _, rest = argument.partition(" ")
    rest = rest.strip()
    if not word:
        chat.screen.table(setting_rows(chat.conversation.settings))
    elif word in _ACTIONS:
        _ACTIONS[word](chat, rest)
    elif not rest:
        name = setting_name(word)
        chat.screen.notice(f"{name} {in_words(chat.conversation.settings, name)}: {SETTINGS[name].set_help}")
    else:
        name = setting_name(word)
        _choose(chat, change(chat.conversation.settings, name, rest))
        chat.screen.notice(f"{name} {in_words(chat.conversation.settings, name)}")


def _choose(chat: Chat, settings: ChatSettings) -> None:
    """Use `settings` from now on, and store them with the session."""
    before, chat.conversation.settings = chat.conversation.settings.on_full, settings
    if settings.on_full not in (before, OnFull.STOP) and chat.conversation.engine.info.server:
        chat.screen.notice(notices.ON_FULL_IS_LOCAL)
    chat.save()


def _save(chat: Chat, name: str) -> None:
    """Store the settings that /set changed, for later chats or as the preset `name`.

    Settings from the command line are for this run only and are not stored.
    """
    settings = chat.conversation.settings
    if name:
        _save_preset(chat, name, settings)
        return
    if not settings.chosen:
        raise UsageError("nothing was set in this chat, so there is nothing to save", remedy=_SET_FIRST)
    # A default is stored too if the top level of the file would override it.
    kept = _kept(settings, chat.config.values())
    chat.config.set((_SECTION,), _changes(settings, settings.chosen, kept))
    where = safe_line(str(chat.config.path))
    shown = ", ".join(f"{each} {in_words(settings, each)}" for each in kept) or "the defaults"
    chat.screen.notice(f"new chats and -p start with {shown}: {where}")


def _save_preset(chat: Chat, name: str, settings: ChatSettings) -> None:
    if not _PRESET_NAME.fullmatch(name):
        raise UsageError(
            f"{safe_line(name, 40)!r} cannot be the name of a preset",
            remedy="use letters, digits, . + - and _",
        )
    values = chat.config.values()
    section = values.get(_SECTION)
    kept = _kept(settings, values, section if isinstance(section, dict) else {})
    if not kept:
        what = "all settings are the defaults" if settings.chosen else "nothing was set in this chat"
        raise UsageError(f"{what}, so the preset would be empty", remedy=_SET_FIRST)
    known = presets_of(values)
    chat.config.set((PRESETS, name), _changes(settings, SETTINGS, kept))
    done = "replaced" if name in known else "saved"
    chat.screen.notice(f"preset {name} {done}; to use it: /set use {name}, or --preset {name}")


def _use(chat: Chat, name: str) -> None:
    presets = _presets(chat)
    if not name:
        listed = ", ".join(safe_line(each, 40) for each in presets)
        chat.screen.notice(f"presets: {listed}" if listed else "no presets yet; /set save NAME makes one")
        return
    preset = presets.get(name)
    if preset is None:
        near = difflib.get_close_matches(name, presets, n=1)
        raise UsageError(
            f"there is no preset {safe_line(name, 40)!r}",
            remedy=f"did you mean {near[0]}?" if near else "/set use lists them, /set save NAME makes one",
        )
    try:
        settings = apply(chat.conversation.settings, preset.values)
    except UsageError as error:
        where = f"{chat.config.path}: [{PRESETS}.{name}]"
        raise UsageError(error.what, where=where, remedy=error.remedy) from error
    if preset.unknown:
        listed = ", ".join(safe_line(each, 40) for each in preset.unknown)
        chat.screen.notice(f"[{PRESETS}.{safe_line(name, 40)}] has unknown settings: {listed}")
    before = chat.conversation.settings
    _choose(chat, settings)
    shown = ", ".join(differences(before, settings)) or "nothing changed"
    chat.screen.notice(f"{safe_line(name, 40)}: {shown}")


def _reset(chat: Chat, argument: str) -> None:
    if argument:
        name = setting_name(argument)
        value = as_value(_DEFAULTS, name)
        _choose(chat, apply(chat.conversation.settings, {SETTINGS[name].key: value}))
        chat.screen.notice(f"{name} {in_words(_DEFAULTS, name)}")
        return
    _choose(chat, _DEFAULTS)
    chat.screen.notice("all settings are the defaults again")


def _kept(settings: ChatSettings, *sections: Mapping[str, object]) -> list[str]:
    """Return the settings to store: those changed in the chat, defaults only if a section overrides them."""
    overridden = {each for section in sections for each in SETTINGS if _spellings(each) & section.keys()}
    return [
        each
        for each in SETTINGS
        if each in settings.chosen
        and (each in overridden or get_setting(settings, each) != get_setting(_DEFAULTS, each))
    ]


def _changes(settings: ChatSettings, names: Iterable[str], kept: Iterable[str]) -> dict[str, Value | None]:
    """Return the changes to a section that store the settings `kept` and remove the others of `names`."""
    changes: dict[str, Value | None] = {key: None for each in names for key in _spellings(each)}
    return changes | {SETTINGS[each].key: as_value(settings, each) for each in kept}


def _spellings(name: str) -> set[str]:
    """Return every key of a setting."""
    return set(spellings(SETTINGS[name].keys))


def _presets(chat: Chat) -> Mapping[str, Preset]:
    return presets_of(chat.config.values())


_ACTIONS: Mapping[str, Callable[[Chat, str], None]] = {"save": _save, "use": _use, "reset": _reset}


def _complete(chat: Chat, typed: str) -> Iterable[str]:
    *before, last = typed.split(" ")
    return [word for word in _words(chat, [word for word in before if word]) if word.startswith(last)]


def _words(chat: Chat, before: list[str]) -> Iterable[str]:
    """Return the words that can follow `before`."""
    if not before:
        return (*SETTINGS, *_ACTIONS)
    if len(before) > 1:
        return ()
    if before[0] == "reset":
        return SETTINGS
    try:
        # If the config file is broken, the command itself reports it.
        return _presets(chat) if before[0] in _ACTIONS else SETTINGS[setting_name(before[0])].words
    except DsmoeError:
        return ()


def _think(chat: Chat, word: str) -> None:
    conversation = chat.conversation
    before = conversation.settings.think
    if word:
        _choose(chat, change(conversation.settings, "think", word))
    think = conversation.settings.think
    last = conversation.last(Role.ASSISTANT)
    if before is Think.HIDE and think is Think.SHOW and last is not None and last.reasoning:
        chat.screen.show(Text(safe_text(last.reasoning.strip()), style="dim"))
    chat.screen.notice(f"think {think}: {_THINK[think]}")
    info = conversation.engine.info
    if not info.server and markers_in(info.template_text) is None:
        chat.screen.notice("note: the chat template of this model has no markers of reasoning")


_THINK: Mapping[Think, str] = {
    Think.SHOW: "the model's reasoning is shown above its answer",
    Think.HIDE: "only the length of the model's reasoning is shown",
    Think.OFF: "the model answers without reasoning",
}
COMMANDS: Commands = {
    "think": Command(
        _think,
        "show or hide the reasoning of a reasoning model, or turn it off",
        f"[{'|'.join(Think)}]",
        complete=lambda chat, typed: [*Think],
    ),
    "set": Command(
        _set,
        "show or change settings; save stores them as defaults, or as a preset that use applies",
        "[NAME [VALUE] | save [NAME] | use NAME | reset [NAME]]",
        complete=_complete,
    ),
}
