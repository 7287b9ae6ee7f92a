"""The settings of replies in one table, for `dsmoe chat`, `dsmoe batch`, `/set` and the config file.

The command line makes its options from this table (`cli.reply_options`). The long flags of a setting are also
its keys in the config file, in the sections of commands and in presets.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, cast

from dsmoe_local.base.config_file import Value, spellings
from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.parameters import REQUEST_RANGES, Ranges, SamplingParameters, check_fields


class OnFull(StrEnum):
    """What happens when the context is full."""

    STOP = "stop"
    SHIFT = "shift"
    COMPACT = "compact"


class Think(StrEnum):
    """What happens to the reasoning of a reasoning model. OFF: it does not reason."""

    SHOW = "show"
    HIDE = "hide"
    OFF = "off"


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


_RANGES: Ranges = {
    # A request may ask for 0 tokens, to get the log-probabilities of its prompt.
    "max_tokens": (lambda value: value is None or _is_positive(value), "1 or more, or -1 for no limit"),
    "reasoning_budget": (REQUEST_RANGES["reasoning_budget"][0], "0 or more, or -1 for no limit"),
    "chat_template_kwargs": REQUEST_RANGES["chat_template_kwargs"],
}


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How replies are generated. Raises UsageError for a value out of range.

    `max_tokens` and `reasoning_budget` None mean no limit. `chosen` names the settings that /set changed in
    this chat: /set save keeps those.
    """

    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    on_full: OnFull = OnFull.STOP
    think: Think = Think.SHOW
    reasoning_budget: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chosen: frozenset[str] = field(default=frozenset(), compare=False)

    def __post_init__(self) -> None:
        check_fields(self, _RANGES)
        if not all(self.stop):
            raise UsageError("a stop string is empty", remedy="leave it out")

    @property
    def budget(self) -> int | None:
        """The most tokens of reasoning; None: no limit."""
        return 0 if self.think is Think.OFF else self.reasoning_budget


PRESETS = "presets"
"""The section of the config file that holds the presets, one subsection each."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named set of settings in the config file: `values` by key. `unknown` keys name no setting."""

    values: Mapping[str, Any]
    unknown: tuple[str, ...] = ()


def _integer_or_none(text: str) -> int | None:
    return None if text.lower() in ("none", "off", "random", "-1") else int(text)


def _limit(text: str) -> int | None:
    return None if text.lower() in ("none", "-1") else int(text)


def _variables(text: str) -> dict[str, Any]:
    """Read the variables of a chat template: a JSON object."""
    value = {} if text.lower() == "none" else json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


# The escapes of Python strings. An octal number above 255 and a backslash before any other character stay as
# they are.
_ESCAPE = (
    r"\\(?:[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}]*\}|[abfnrtv\\'\"]|[xuUN])"
)


def _unescaped(escape: re.Match[str]) -> str:
    return escape[0].encode("ascii").decode("unicode_escape")


def _stop_texts(text: str) -> tuple[str, ...]:
    """Read stop strings: a JSON list, or one string with escapes."""
    if text.lower() in ("none", "off"):
        return ()
    try:
        listed = json.loads(text) if text.startswith("[") else None
    except ValueError:
        listed = None
    if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
        texts = tuple(listed)
    else:
        texts = (re.sub(_ESCAPE, _unescaped, text),)
    # Raises ValueError for a lone surrogate, which an escape can produce.
    "".join(texts).encode()
    return texts


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: `name` is the field of ChatSettings or SamplingParameters, and the name that /set shows.

    `read` turns text into a value and raises ValueError. `help` describes the setting, for `--help` and /set
    alike; `set_hint` adds what only /set takes. `words` are the values to complete, all of them if the
    command line offers a choice.
    """

    name: str
    flags: tuple[str, ...]
    read: Callable[[str], Any]
    help: str
    metavar: str = "X"
    words: tuple[str, ...] = ()
    set_hint: str = ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys in the config file; programs write the first one."""
        return tuple(flag.removeprefix("--") for flag in self.flags if flag.startswith("--"))

    @property
    def key(self) -> str:
        """The key that programs write into the config file."""
        return self.keys[0]

    @property
    def set_help(self) -> str:
        """The description for /set."""
        return "; ".join(filter(None, (self.help, self.set_hint)))


_TABLE = (
    Setting(
        "temperature",
        ("--temp", "--temperature"),
        float,
        "temperature of sampling; 0 = greedy",
    ),
    Setting("top_k", ("--top-k",), int, "sample among the N likeliest tokens; 0 = off", "N"),
    Setting(
        "top_p", ("--top-p",), float, "sample among the likeliest tokens that add up to this share; 1 = off"
    ),
    Setting(
        "min_p",
        ("--min-p",),
        float,
        "drop tokens less likely than this fraction of the likeliest one; 0 = off",
    ),
    Setting("typical_p", ("--typical", "--typical-p"), float, "locally typical sampling; 1 = off"),
    Setting("repeat_penalty", ("--repeat-penalty",), float, "penalty for repeated tokens; 1 = off"),
    Setting(
        "repeat_last_n",
        ("--repeat-last-n",),
        int,
        "number of last tokens that penalties apply to; 0 = off",
        "N",
    ),
    Setting(
        "presence_penalty",
        ("--presence-penalty",),
        float,
        "subtract this from the logit of every token that occurred; 0 = off",
    ),
    Setting(
        "frequency_penalty",
        ("--frequency-penalty",),
        float,
        "subtract this from the logit for each occurrence of a token; 0 = off",
    ),
    Setting(
        "mirostat",
        ("--mirostat",),
        int,
        "mirostat 1 or 2 in place of top-k, top-p, min-p and typical; 0 = off",
        "N",
        ("0", "1", "2"),
    ),
    Setting("mirostat_tau", ("--mirostat-ent", "--mirostat-tau"), float, "target entropy of mirostat"),
    Setting("mirostat_eta", ("--mirostat-lr", "--mirostat-eta"), float, "learning rate of mirostat"),
    Setting(
        "seed",
        ("-s", "--seed"),
        _integer_or_none,
        "random seed; -1 = a new one for each reply",
        "N",
        ("none",),
    ),
    Setting(
        "max_tokens",
        ("-n", "--predict", "--n-predict", "--max-tokens"),
        _integer_or_none,
        "maximum length of a reply in tokens; -1 = no limit",
        "N",
        ("none",),
    ),
    Setting(
        "stop",
        ("-r", "--reverse-prompt", "--stop"),
        _stop_texts,
        "end a reply before this text",
        "TEXT",
        ("none",),
        'several: ["a", "b"]; none = off',
    ),
    Setting(
        "on_full",
        ("--on-full",),
        lambda text: OnFull(text.lower()),
        "when the context is full: stop, shift (drop the oldest tokens) or compact (drop the oldest turns)",
        words=tuple(OnFull),
    ),
    Setting(
        "think",
        ("--think",),
        lambda text: Think(text.lower()),
        "reasoning of a reasoning model: show it, hide it, or turn it off",
        words=tuple(Think),
    ),
    Setting(
        "reasoning_budget",
        ("--reasoning-budget",),
        _limit,
        "end reasoning after N tokens; 0 = no reasoning, -1 = no limit",
        "N",
        ("none",),
    ),
    Setting(
        "chat_template_kwargs",
        ("--chat-template-kwargs",),
        _variables,
        'variables for the chat template, such as {"enable_thinking": false}',
        "JSON",
        ("none",),
    ),
)
SETTINGS: Mapping[str, Setting] = {each.name: each for each in _TABLE}

KEYS: Mapping[str, str] = {key: each.name for each in _TABLE for key in spellings(each.keys)}
"""The setting of each key of the config file, with dashes and with underscores."""
_NAMES: Mapping[str, str] = {
    flag.lstrip("-"): each.name for each in _TABLE for flag in (*each.flags, each.name.replace("_", "-"))
}
_SAMPLING = frozenset(item.name for item in fields(SamplingParameters))


def setting_name(word: str) -> str:
    """Return the setting that a flag without its dashes, or a name, stands for.

    UsageError, with the nearest name, if there is none.
    """
    key = word.strip().lower().replace("_", "-")
    if key in _NAMES:
        return _NAMES[key]
    near = difflib.get_close_matches(key.replace("-", "_"), SETTINGS, n=1)
    raise UsageError(
        f"there is no setting {safe_line(word, 40)!r}",
        remedy=f"did you mean {near[0]}?" if near else f"settings: {', '.join(SETTINGS)}",
    )


def get_setting(settings: ChatSettings, name: str) -> Any:  # noqa: ANN401 - any setting's value
    """Return the value of a setting."""
    return getattr(settings.sampling if name in _SAMPLING else settings, name)


def change(settings: ChatSettings, name: str, text: str) -> ChatSettings:
    """Return `settings` with one value read from `text`. UsageError if it is unreadable or out of range."""
    setting = SETTINGS[name]
    try:
        value = setting.read(text.strip())
    except (ValueError, OverflowError) as error:
        raise UsageError(f"{name} cannot be {safe_line(text, 40)!r}", remedy=setting.set_help) from error
    return _with(settings, name, value)


def apply(settings: ChatSettings, values: Mapping[str, Any]) -> ChatSettings:
    """Return `settings` with those of a section of the config file. UsageError for a wrong key or value."""
    for key, value in values.items():
        name = setting_name(key)
        if name == "stop" and isinstance(value, str | list):
            # TOML has read the escapes already.
            texts = [value] if isinstance(value, str) else value
            settings = _with(settings, name, tuple(texts))
        elif name == "chat_template_kwargs" and isinstance(value, dict):
            settings = _with(settings, name, value)
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            settings = change(settings, name, str(value))
        else:
            raise UsageError(f"{key} cannot be {safe_line(str(value), 40)}", remedy=SETTINGS[name].set_help)
    return settings


def presets_of(values: Mapping[str, Any]) -> dict[str, Preset]:
    """Return the presets in the values of a config file."""
    presets = values.get(PRESETS, {})
    if not isinstance(presets, dict):
        return {}
    return {name: _preset(section) for name, section in presets.items() if isinstance(section, dict)}


def _preset(section: Mapping[str, Any]) -> Preset:
    values = {}
    for setting in _TABLE:
        # If a section has two keys of one setting, the first in the table counts.
        key = next((key for key in spellings(setting.keys) if key in section), None)
        if key is not None:
            values[key] = section[key]
    return Preset(values, tuple(key for key in section if key not in values))


def as_value(settings: ChatSettings, name: str) -> Value:
    """Return the value of a setting as the config file stores it."""
    value = get_setting(settings, name)
    if value is None:
        return -1
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value) if isinstance(value, StrEnum) else cast(Value, value)


def in_words(settings: ChatSettings, name: str) -> str:
    """Return the value of a setting as text that `change` reads; safe to print."""
    value = get_setting(settings, name)
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple | dict):
        # JSON with an escape for each character that is not safe to print.
        return "".join(
            letter if letter == safe_line(letter) else json.dumps(letter)[1:-1]
            for letter in json.dumps(value, ensure_ascii=False).replace("\N{DELETE}", "\\u007f")
        )
    return str(value).removesuffix(".0")


def setting_rows(settings: ChatSettings) -> list[tuple[str, str, str]]:
    """Return name, value and help of every setting; a value that is not the default names the default."""
    rows = []
    for name, setting in SETTINGS.items():
        value, default = in_words(settings, name), in_words(ChatSettings(), name)
        rows.append((name, value if value == default else f"{value} (default {default})", setting.set_help))
    return rows


def _with(settings: ChatSettings, name: str, value: object) -> ChatSettings:
    changes: dict[str, Any] = {name: value}
    if name in _SAMPLING:
        changes = {"sampling": replace(settings.sampling, **changes)}
    return replace(settings, **changes, chosen=settings.chosen | {name})
