"""Fields of a request's body, as OpenAI and vLLM name them: honoured, harmless, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.lines import LineError
from dsmoe_local.engine.types import MAX_SEED, Message, SamplingParameters

Parts: TypeAlias = dict[str, Any]
"""Attributes of Request and of SamplingParameters."""
Reader: TypeAlias = Callable[[str, object], Parts]

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MESSAGE_KEYS = frozenset({"role", "content", "name", "refusal"})


def read_fields(body: Mapping[str, Any], *, chat: bool) -> Parts:
    """What the fields of a body ask for. LineError names the first that cannot be had."""
    _check_beginning(body)
    parts: Parts = {}
    sources: dict[str, str] = {}
    for key, value in body.items():
        if value is None or key in IGNORED:
            continue
        if key in HONOURED:
            for target, part in HONOURED[key](key, value).items():
                if parts.setdefault(target, part) != part:
                    raise LineError(f"{sources[target]} and {key} differ")
                sources.setdefault(target, key)
        elif key not in NEUTRAL:
            raise LineError(f"unknown field {safe_line(key, 40)!r}")
        elif value not in (*NEUTRAL[key], *_NEUTRAL_IN[chat].get(key, ())):
            raise LineError(f"{key} is not supported", remedy=_only(NEUTRAL[key]))
    return parts


def _check_beginning(body: Mapping[str, Any]) -> None:
    """vLLM's rule: either a new reply begins, or the last message goes on. Neither is of no use here."""
    begins, continues = body.get("add_generation_prompt"), body.get("continue_final_message")
    if begins is True and continues is True:
        raise LineError(
            "add_generation_prompt and continue_final_message exclude each other", remedy="set one of them"
        )
    if begins is False and continues is not True:
        raise LineError(
            "add_generation_prompt is not supported as false alone",
            remedy="leave it out, or set continue_final_message to true",
        )


def _only(values: tuple[Any, ...]) -> str:
    accepted = " or ".join(json.dumps(value) for value in values)
    return f"leave it out{f', or use {accepted}' if accepted else ''}"


def as_text(key: str, value: object) -> str:
    """`value`, if it is text."""
    if not isinstance(value, str):
        raise LineError(f"{key} is not text")
    return value


def as_integer(key: str, value: object) -> int:
    """`value`, if it is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise LineError(f"{key} is not a whole number")
    return value


def as_number(key: str, value: object) -> float:
    """`value`, if it is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise LineError(f"{key} is not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise LineError(f"{key} is out of range") from error


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise LineError(f"{key} is neither true nor false")
    return value


def _stop(key: str, value: object) -> tuple[str, ...]:
    return tuple(as_text(key, item) for item in (value if isinstance(value, list) else [value]))


def _seed(key: str, value: object) -> int:
    # OpenAI takes 64 bits with a sign.
    return as_integer(key, value) % (MAX_SEED + 1)


def _n_predict(key: str, value: object) -> int | None:
    # llama.cpp sets no limit with -1.
    number = as_integer(key, value)
    return None if number == -1 else number


def _top_k(key: str, value: object) -> int:
    # vLLM turns it off with -1.
    number = as_integer(key, value)
    return 0 if number == -1 else number


def _bias(key: str, value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise LineError(f"{key} is not an object of token ids")
    pairs = []
    for name, bias in value.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise LineError(f"{key}: {safe_line(name, 20)!r} is not a token id")
        pairs.append((int(name), as_number(key, bias)))
    return tuple(pairs)


def _schema(key: str, value: object) -> str:
    """A schema as text: given so, or as JSON."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | bool):
        raise LineError(f"{key} is not a JSON schema")
    return json.dumps(value)


def _prompt(key: str, value: object) -> str | tuple[int, ...]:
    if not isinstance(value, list):
        return as_text(key, value)
    if not value:
        raise LineError(f"{key} is an empty list")
    if all(isinstance(item, str | list) for item in value):
        if len(value) > 1:
            raise LineError(f"{key} is a list of {len(value)} prompts", remedy="give each a line of its own")
        return _prompt(key, value[0])
    return tuple(as_integer(key, item) for item in value)


def _messages(key: str, value: object) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise LineError("messages is not a list of messages")
    return tuple(_message(item) for item in value)


def _message(item: object) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= set(item):
        raise LineError("a message takes role and content")
    given = {key for key, value in item.items() if value is not None and value != []}
    if foreign := sorted(given - _MESSAGE_KEYS):
        raise LineError(f"a message's {safe_line(foreign[0], 40)} is not supported")
    role = as_text("role", item["role"])
    if role not in _ROLES:
        raise LineError(f"the role {safe_line(role, 40)!r} is not supported")
    return Message(_ROLES[role], _content(item["content"]))


def _content(value: object) -> str:
    if not isinstance(value, list):
        return as_text("content", value)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise LineError(f"content of the type {safe_line(str(kind), 40)!r} is not supported")
        texts.append(as_text("content", part.get("text")))
    return "\n".join(texts)


def _logprobs(key: str, value: object) -> Parts:
    """Chat says true and `top_logprobs`; completions say how many."""
    if isinstance(value, bool):
        return {"logprobs": value}
    return {"logprobs": True, "top_logprobs": as_integer(key, value)}


def _response_format(key: str, value: object) -> Parts:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": '{"type": "object"}'}
    wrapped = value.get("json_schema") if isinstance(value, dict) else None
    if kind != "json_schema" or not isinstance(wrapped, dict) or "schema" not in wrapped:
        raise LineError(
            f"{key} is not supported", remedy="it takes text, json_object, or json_schema with a schema"
        )
    return {"json_schema": _schema(f"{key}.json_schema.schema", wrapped["schema"])}


def _structured(key: str, value: object) -> Parts:
    """vLLM's newer name for what constrains a reply."""
    if not isinstance(value, dict):
        raise LineError(f"{key} is not an object")
    known: dict[str, Reader] = {"json": _to("json_schema", _schema), "grammar": _to("grammar", as_text)}
    parts: Parts = {}
    for name, part in value.items():
        if part is None:
            continue
        if name not in known:
            raise LineError(f"{key}.{safe_line(name, 40)} is not supported")
        parts |= known[name](f"{key}.{name}", part)
    return parts


def _to(target: str, convert: Callable[[str, object], Any]) -> Reader:
    return lambda key, value: {target: convert(key, value)}


_WHOLE = ("repeat_last_n", "mirostat")
HONOURED: Mapping[str, Reader] = {
    "prompt": _to("prompt", _prompt),
    "messages": _to("prompt", _messages),
    "max_tokens": _to("max_tokens", as_integer),
    "max_completion_tokens": _to("max_tokens", as_integer),
    "n_predict": _to("max_tokens", _n_predict),
    "stop": _to("stop", _stop),
    "n": _to("n", as_integer),
    "logprobs": _logprobs,
    "top_logprobs": _to("top_logprobs", as_integer),
    "logit_bias": _to("logit_bias", _bias),
    "response_format": _response_format,
    "structured_outputs": _structured,
    "json_schema": _to("json_schema", _schema),
    "guided_json": _to("json_schema", _schema),
    "grammar": _to("grammar", as_text),
    "guided_grammar": _to("grammar", as_text),
    "context_shift": _to("context_shift", _flag),
    "continue_final_message": _to("continue_final_message", _flag),
    # What it may be beside the one above is checked before.
    "add_generation_prompt": lambda key, value: {"continue_final_message": not _flag(key, value)},
    **{
        item.name: _to(item.name, as_integer if item.name in _WHOLE else as_number)
        for item in fields(SamplingParameters)
    },
    "temp": _to("temperature", as_number),
    "repetition_penalty": _to("repeat_penalty", as_number),
    "seed": _to("seed", _seed),
    "top_k": _to("top_k", _top_k),
}
IGNORED = frozenset(
    {
        "model",  # the loaded one answers; the job says so once
        "user",
        "safety_identifier",
        "metadata",
        "store",
        "stream",
        "stream_options",
        "service_tier",
        "priority",
        "request_id",
        "cache_salt",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
        "guided_decoding_backend",
    }
)
"""They do not change what the reply is."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "suffix": ("",),
    "echo": (False,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (),
    "prompt_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "guided_regex": (),
    "guided_choice": (),
    "guided_whitespace_pattern": (),
}
"""Fields that would change the reply in ways there are no means for, with the values that ask for nothing."""
_NEUTRAL_IN: Mapping[bool, Mapping[str, tuple[Any, ...]]] = {
    True: {"add_special_tokens": (False,)},
    False: {"add_special_tokens": (True,)},
}
