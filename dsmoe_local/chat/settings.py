"""The settings of a conversation that can change while it runs, as one table. Shows nothing.

The table also says under which keys the config file has a setting, in `[chat]` and in presets: those of its
long flags.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from dsmoe_local.base.config_file import Value, spellings
from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.turns import OnFull
from dsmoe_local.engine.types import SamplingParameters


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How replies are generated. `max_tokens` None: until the model stops or the context is full; `on_full`
    says what happens then. `chosen` names the settings that were made in the chat: what /set save keeps.
    """

    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    on_full: OnFull = OnFull.STOP
    chosen: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True, slots=True)
class Setting:
    """One name of `/set`: its key in the config file, how its value is read, what it does, the words that its
    value may be, and other keys that mean the same. The setting's own name is one of them.
    """

    key: str
    read: Callable[[str], Any]
    help: str
    words: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


PRESETS = "presets"
"""The section of the config file whose sections are presets."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings kept under a name in the config file: their `values` by key, and `unknown` keys, which mean
    nothing there.
    """

    values: Mapping[str, Any]
    unknown: tuple[str, ...] = ()


_NOTHING = ("none", "off", "random", "-1")


def _optional_integer(text: str) -> int | None:
    return None if text.lower() in _NOTHING else int(text)


# Python's, but for octal numbers that are no byte; a backslash before anything else is one.
_ESCAPE = re.compile(
    r"\\(?:[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|[abfnrtv\\'\"]|[xuUN])"
)


def _unescaped(escape: re.Match[str]) -> str:
    return escape[0].encode("ascii").decode("unicode_escape")


def _stop(text: str) -> tuple[str, ...]:
    if text.lower() in ("none", "off"):
        return ()
    try:
        listed = json.loads(text) if text.startswith("[") else None
    except ValueError:
        listed = None
    if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
        texts = tuple(listed)
    else:
        texts = (_ESCAPE.sub(_unescaped, text),)
    # An escape may make what is no text: half a surrogate pair.
    "".join(texts).encode()
    return texts


SETTINGS: Mapping[str, Setting] = {
    "temperature": Setting("temp", float, "how freely words are chosen; 0 takes the likeliest"),
    "top_k": Setting("top-k", int, "choose among the K likeliest tokens; 0 = all"),
    "top_p": Setting("top-p", float, "choose among the likeliest tokens that hold this probability; 1 = all"),
    "min_p": Setting("min-p", float, "drop tokens less likely than this part of the likeliest; 0 = none"),
    "typical_p": Setting("typical", float, "locally typical sampling; 1 = off"),
    "repeat_penalty": Setting("repeat-penalty", float, "make recent tokens less likely; 1 = off"),
    "repeat_last_n": Setting("repeat-last-n", int, "how many tokens the penalties look back; 0 = off"),
    "presence_penalty": Setting(
        "presence-penalty", float, "subtracted once from every recent token; 0 = off"
    ),
    "frequency_penalty": Setting(
        "frequency-penalty", float, "subtracted for every recent occurrence; 0 = off"
    ),
    "mirostat": Setting(
        "mirostat",
        int,
        "1 or 2 hold the surprise steady, in place of top_k to typical_p; 0 = off",
        ("0", "1", "2"),
    ),
    "mirostat_tau": Setting("mirostat-ent", float, "the surprise that mirostat holds"),
    "mirostat_eta": Setting("mirostat-lr", float, "how fast mirostat learns"),
    "seed": Setting(
        "seed", _optional_integer, "fixes the random choices; none = a new one for each reply", ("none",)
    ),
    "max_tokens": Setting(
        "predict",
        _optional_integer,
        "longest reply; none = until the context is full",
        ("none",),
        ("n-predict",),
    ),
    "stop": Setting(
        "reverse-prompt", _stop, 'a text that ends a reply, or several: ["a", "b"]; none = off', ("none",)
    ),
    "on_full": Setting(
        "on-full",
        lambda text: OnFull(text.lower()),
        "when the context is full: stop, shift (drop the oldest text) or compact (drop whole turns)",
        tuple(OnFull),
    ),
}


def keys_of_setting(name: str) -> tuple[str, ...]:
    """The keys of one of SETTINGS, all of them long flags of the chat; what is written is the first."""
    setting = SETTINGS[name]
    return tuple(dict.fromkeys((setting.key, name.replace("_", "-"), *setting.aliases)))


KEYS: Mapping[str, str] = {key: name for name in SETTINGS for key in spellings(keys_of_setting(name))}
"""The setting that a key of the config file means, with dashes or underscores."""
_NAMES: Mapping[str, str] = {**KEYS, "n": "max_tokens"}
_SAMPLING = frozenset(item.name for item in fields(SamplingParameters))


def setting_name(word: str) -> str:
    """The setting that `word` names, dashes and short forms allowed. UsageError with the nearest if none."""
    key = word.strip().lower().replace("_", "-")
    if key in _NAMES:
        return _NAMES[key]
    near = difflib.get_close_matches(key.replace("-", "_"), SETTINGS, n=1)
    raise UsageError(
        f"there is no setting {safe_line(word, 40)!r}",
        remedy=f"did you mean {near[0]}?" if near else f"there are: {', '.join(SETTINGS)}",
    )


def get_setting(settings: ChatSettings, name: str) -> Any:  # noqa: ANN401 - any setting's value
    """The value of one of SETTINGS."""
    return getattr(settings.sampling if name in _SAMPLING else settings, name)


def change(settings: ChatSettings, name: str, text: str) -> ChatSettings:
    """`settings` with one value read from `text`. UsageError if it cannot be read or is out of range."""
    try:
        value = SETTINGS[name].read(text.strip())
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name} cannot be {safe_line(text, 40)!r}", remedy=SETTINGS[name].help) from error
    if name == "max_tokens" and value is not None and value < 1:
        raise UsageError("max_tokens must be 1 or more", remedy=SETTINGS[name].help)
    if name == "stop" and not all(value):
        raise UsageError("a stop text is empty", remedy=SETTINGS[name].help)
    return _with(settings, name, value)


def apply(settings: ChatSettings, values: Mapping[str, Any]) -> ChatSettings:
    """`settings` with those that a section of the config file has. UsageError for a key or value that is
    wrong.
    """
    for key, value in values.items():
        name = setting_name(key)
        if name == "stop" and isinstance(value, str | list):
            # As they are: TOML has escapes of its own.
            texts = [value] if isinstance(value, str) else value
            if not all(isinstance(text, str) and text for text in texts):
                raise UsageError(f"{key} takes a text, or a list of texts", remedy=SETTINGS[name].help)
            settings = _with(settings, name, tuple(texts))
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            settings = change(settings, name, str(value))
        else:
            raise UsageError(f"{key} cannot be {safe_line(str(value), 40)}", remedy=SETTINGS[name].help)
    return settings


def presets_of(values: Mapping[str, Any]) -> dict[str, Preset]:
    """The presets in a config file's values, for all who read them."""
    presets = values.get(PRESETS, {})
    if not isinstance(presets, dict):
        return {}
    return {name: _preset(section) for name, section in presets.items() if isinstance(section, dict)}


def _preset(section: Mapping[str, Any]) -> Preset:
    values = {}
    for name in SETTINGS:
        # Of a setting that is there twice, the usual key counts.
        key = next((key for key in spellings(keys_of_setting(name)) if key in section), None)
        if key is not None:
            values[key] = section[key]
    return Preset(values, tuple(key for key in section if key not in values))


def as_value(settings: ChatSettings, name: str) -> Value:
    """The value of one of SETTINGS as the config file has it."""
    value = get_setting(settings, name)
    if value is None:
        return -1
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, OnFull) else cast(Value, value)


def in_words(settings: ChatSettings, name: str) -> str:
    """The value of one of SETTINGS for people, in a form that `change` reads; safe to print."""
    value = get_setting(settings, name)
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        # What is not safe to print is told by its number, so that all of it can be read back.
        return "".join(
            letter if letter == safe_line(letter) else json.dumps(letter)[1:-1]
            for letter in json.dumps(value, ensure_ascii=False).replace("\N{DELETE}", "\\u007f")
        )
    return str(value).removesuffix(".0")


def setting_rows(settings: ChatSettings) -> list[tuple[str, str, str]]:
    """Name, value and help of every setting, for people; the default beside a value that differs from it."""
    rows = []
    for name, setting in SETTINGS.items():
        value, default = in_words(settings, name), in_words(ChatSettings(), name)
        rows.append((name, value if value == default else f"{value} (default {default})", setting.help))
    return rows


def _with(settings: ChatSettings, name: str, value: object) -> ChatSettings:
    changes: dict[str, Any] = {name: value}
    if name in _SAMPLING:
        changes = {"sampling": replace(settings.sampling, **changes)}
    return replace(settings, **changes, chosen=settings.chosen | {name})
