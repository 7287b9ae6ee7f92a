"""The settings of a conversation that can change while it runs, as one table. Shows nothing."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.turns import OnFull
from dsmoe_local.engine.types import SamplingParameters


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """How replies are generated. `max_tokens` None: until the model stops or the context is full; `on_full`
    says what happens then.
    """

    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    on_full: OnFull = OnFull.STOP


@dataclass(frozen=True, slots=True)
class Setting:
    """One name of `/set`: how its value is read, and what it does."""

    read: Callable[[str], Any]
    help: str


def _optional_integer(text: str) -> int | None:
    return None if text.lower() in ("none", "off", "random", "-1") else int(text)


def _stop(text: str) -> tuple[str, ...]:
    if text.lower() in ("none", "off"):
        return ()
    # unicode_escape reads Latin-1; what that lacks is escaped, so that it survives.
    return (text.encode("latin-1", "backslashreplace").decode("unicode_escape"),)


SETTINGS: Mapping[str, Setting] = {
    "temperature": Setting(float, "how freely words are chosen; 0 takes the likeliest"),
    "top_k": Setting(int, "choose among the K likeliest tokens; 0 = all"),
    "top_p": Setting(float, "choose among the likeliest tokens that hold this probability; 1 = all"),
    "min_p": Setting(float, "drop tokens less likely than this part of the likeliest; 0 = none"),
    "typical_p": Setting(float, "locally typical sampling; 1 = off"),
    "repeat_penalty": Setting(float, "make recent tokens less likely; 1 = off"),
    "repeat_last_n": Setting(int, "how many tokens the penalties look back; 0 = off"),
    "presence_penalty": Setting(float, "subtracted once from every recent token; 0 = off"),
    "frequency_penalty": Setting(float, "subtracted for every recent occurrence; 0 = off"),
    "seed": Setting(_optional_integer, "fixes the random choices; none = a new one for each reply"),
    "max_tokens": Setting(_optional_integer, "longest reply; none = until the context is full"),
    "stop": Setting(_stop, "a text that ends a reply; none = off"),
}
_SHORT = {"temp": "temperature", "n_predict": "max_tokens", "predict": "max_tokens", "typical": "typical_p"}
_SAMPLING = frozenset(item.name for item in fields(SamplingParameters))


def setting_name(word: str) -> str:
    """The setting that `word` names, dashes and short forms allowed. UsageError with the nearest if none."""
    name = word.strip().lower().replace("-", "_")
    name = _SHORT.get(name, name)
    if name in SETTINGS:
        return name
    near = difflib.get_close_matches(name, SETTINGS, n=1)
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
    except (ValueError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} cannot be {safe_line(text, 40)!r}", remedy=SETTINGS[name].help) from error
    if name == "max_tokens" and value is not None and value < 1:
        raise UsageError("max_tokens must be 1 or more", remedy=SETTINGS[name].help)
    if name in _SAMPLING:
        return replace(settings, sampling=replace(settings.sampling, **{name: value}))
    return replace(settings, **{name: value})
