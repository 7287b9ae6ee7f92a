"""Sampling parameters, and the valid values of all fields of requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.tools.calls import Tools

MAX_SEED = 2**32 - 2  # to llama.cpp, 2**32 - 1 means a random seed
MAX_REPLIES = 64
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How the next token is sampled. Raises UsageError for a value out of range.

    `temperature` 0 takes the likeliest token. With `mirostat` 1 or 2, Mirostat sampling (version 1 or 2, with
    the target entropy `mirostat_tau` and the learning rate `mirostat_eta`) replaces top_k, top_p, min_p and
    typical_p.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, RANGES)


class ReplyStart(StrEnum):
    """What a reply may begin with.

    - ANSWER: all of it is the answer.
    - DETECT: reasoning, if the end of the prompt or the beginning of the reply is the model's opening marker.
    - REASONING: it continues reasoning, unless the prompt ends with the closing marker.
    """

    ANSWER = "answer"
    DETECT = "detect"
    REASONING = "reasoning"


class FieldError(UsageError):
    """A field of a request has a value that is out of range."""

    def __init__(self, field: str, value: object, accepted: str) -> None:
        super().__init__(
            f"{field} = {safe_line(str(value), 40)} is out of range", remedy=f"it takes {accepted}"
        )
        self.field = field


Check: TypeAlias = Callable[[object], bool]
Ranges: TypeAlias = Mapping[str, tuple[Check, str]]
"""By field: a check of its value, and a description of the valid values for the user."""


def check_fields(values: object, ranges: Ranges) -> None:
    """Raise FieldError unless each field of `values` that `ranges` names has a valid value."""
    for name, (check, accepted) in ranges.items():
        value = getattr(values, name)
        if not check(value):
            raise FieldError(name, value, accepted)


def _between(low: float, high: float) -> Check:
    # The comparison is False for NaN. Unlike math.isfinite, it accepts integers of any size.
    return lambda value: isinstance(value, int | float) and type(value) is not bool and low <= value <= high


def _whole(low: int, high: float = float("inf")) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _is(kind: type) -> Check:
    return lambda value: type(value) is kind


def _all(check: Check) -> Check:
    return lambda value: isinstance(value, tuple) and all(map(check, value))


def _is_bias(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and type(value[0]) is int and _bias_range(value[1])


_bias_range = _between(-1000, 1000)
_RESERVED = frozenset({"messages", "add_generation_prompt"})


def _are_variables(value: object) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(name, str) for name in value)
        and not _RESERVED & value.keys()
    )


RANGES: Ranges = {
    "temperature": (_between(0, 100), "a number from 0 (always the likeliest token) to 100"),
    "top_k": (_whole(0, 2**31 - 1), "a whole number, 0 = off"),
    "top_p": (_between(0, 1), "a number from 0 to 1, 1 = off"),
    "min_p": (_between(0, 1), "a number from 0 to 1, 0 = off"),
    "typical_p": (_between(0, 1), "a number from 0 to 1, 1 = off"),
    "repeat_penalty": (_between(0.01, 100), "a number from 0.01 to 100, 1 = off"),
    "repeat_last_n": (_whole(0, 2**20), "a whole number of tokens, 0 = off"),
    "presence_penalty": (_between(-100, 100), "a number, 0 = off"),
    "frequency_penalty": (_between(-100, 100), "a number, 0 = off"),
    "mirostat": (_whole(0, 2), "0 (off), 1 or 2"),
    "mirostat_tau": (_between(0, 100), "a number from 0 to 100"),
    "mirostat_eta": (_between(0, 1), "a number from 0 to 1"),
    "seed": (_or_none(_whole(0, MAX_SEED)), f"a whole number from 0 to {MAX_SEED}"),
}

REQUEST_RANGES: Ranges = {
    "id": (_is(str), "text"),
    "sampling": (_is(SamplingParameters), "sampling parameters"),
    "max_tokens": (_or_none(_whole(0)), "a whole number from 0"),
    "stop": (_all(lambda text: type(text) is str and bool(text)), "stop strings that are not empty"),
    "n": (_whole(1, MAX_REPLIES), f"a whole number from 1 to {MAX_REPLIES}"),
    "echo": (_is(bool), "true or false"),
    "logprobs": (_is(bool), "true or false"),
    "top_logprobs": (_whole(0, MAX_TOP_LOGPROBS), f"a whole number from 0 to {MAX_TOP_LOGPROBS}"),
    "logit_bias": (_all(_is_bias), "pairs of a token id and a number from -1000 to 1000"),
    "grammar": (_or_none(_is(str)), "text"),
    "json_schema": (_or_none(_is(str)), "text"),
    "context_shift": (_is(bool), "true or false"),
    "n_keep": (_whole(0), "a whole number from 0"),
    "score_from": (_or_none(_whole(0)), "an index from 0"),
    "continue_final_message": (_is(bool), "true or false"),
    "reply_start": (_or_none(_is(ReplyStart)), "answer, detect or reasoning"),
    "reasoning_budget": (_or_none(_whole(0)), "a whole number of tokens, 0 = no reasoning"),
    "tools": (_or_none(_is(Tools)), "tools"),
    "chat_template_kwargs": (
        _are_variables,
        'a JSON object of variables, such as {"enable_thinking": false}, without messages',
    ),
}
