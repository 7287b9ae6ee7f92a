"""Turn lines into requests: OpenAI's batch lines and the short form.

Every field is honoured, ignored because it does not change a reply, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.lines import Line, LineError
from dsmoe_local.engine.types import MAX_SEED, Message, Request, SamplingParameters

Parts: TypeAlias = dict[str, Any]
"""Attributes of Request and of SamplingParameters, by name."""
Reader: TypeAlias = Callable[[str, object], Parts]
"""Takes the name and the value of a field. Raises LineError."""

_ENDPOINTS = {"/v1/chat/completions": True, "/v1/completions": False}
_ENVELOPE = frozenset({"method", "url", "body"})
_IDS = frozenset({"id", "custom_id"})
_SAMPLING = frozenset(item.name for item in fields(SamplingParameters))
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_REASONING_KEYS = ("reasoning_content", "reasoning")  # the second one is vLLM's newer name
_MESSAGE_KEYS = frozenset({"role", "content", "name", "refusal", *_REASONING_KEYS})


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """Values for what a line does not set itself."""

    sampling: SamplingParameters
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    reasoning_budget: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def request_of(line: Line, defaults: BatchDefaults) -> Request:
    """Return the request that a line asks for. Raises LineError, UsageError."""
    if line.error is not None:
        raise line.error
    body, chat = _envelope(line.values) if "body" in line.values else _short(line.values)
    parts = _read_fields(body, chat=chat)
    sampling = {name: parts.pop(name) for name in _SAMPLING & parts.keys()}
    given: dict[str, Any] = {
        "max_tokens": defaults.max_tokens,
        "stop": defaults.stop,
        "reasoning_budget": defaults.reasoning_budget,
    } | parts
    # As in llama.cpp's server, a line adds variables to those of the command.
    given["chat_template_kwargs"] = {**defaults.chat_template_kwargs, **parts.get("chat_template_kwargs", {})}
    chosen = replace(defaults.sampling, **sampling) if sampling else defaults.sampling
    return Request(line.id, sampling=chosen, **given)


def request_values(values: Mapping[str, Any], extra: Collection[str]) -> Mapping[str, Any]:
    """Return a line's fields without its id and without the `extra` fields that are not part of a request.

    The fields of its body are filtered likewise.
    """
    foreign = set(extra) - _KNOWN
    rest = {name: value for name, value in values.items() if name not in foreign | _IDS}
    if foreign and isinstance(body := rest.get("body"), Mapping):
        rest["body"] = {name: value for name, value in body.items() if name not in foreign}
    return rest


def model_named(line: Line) -> str:
    """Return the model that a line names; empty if it names none."""
    body = line.values.get("body", line.values)
    name = body.get("model") if isinstance(body, Mapping) else None
    return name if isinstance(name, str) else ""


def _envelope(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    if foreign := sorted(set(values) - _ENVELOPE):
        raise LineError(f"unknown field {safe_line(foreign[0], 40)!r} beside body")
    method, url, body = values.get("method", "POST"), values.get("url"), values["body"]
    if method != "POST":
        raise LineError("method is not POST")
    if not isinstance(body, dict):
        raise LineError("body is not an object")
    if not isinstance(url, str) or url not in _ENDPOINTS:
        raise LineError(
            f"the url {safe_line(str(url), 60)!r} is not supported",
            remedy=f"use {' or '.join(_ENDPOINTS)}",
        )
    chat = _ENDPOINTS[url]
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if body.get(wanted) is None or body.get(other) is not None:
        raise LineError(f"{url} takes {wanted}, not {other}")
    return body, chat


def _short(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    chat = values.get("messages") is not None
    if chat == (values.get("prompt") is not None):
        raise LineError(
            "a line takes a prompt or messages, not both"
            if chat
            else "the line has no prompt and no messages"
        )
    return values, chat


def _read_fields(body: Mapping[str, Any], *, chat: bool) -> Parts:
    """Read the fields of a body. LineError names the first one that is not supported."""
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
    """Raise LineError if the flags contradict each other: as in vLLM, a reply either begins a new message or
    continues the last one.
    """
    begins, continues = body.get("add_generation_prompt"), body.get("continue_final_message")
    if begins is True and continues is True:
        raise LineError(
            "add_generation_prompt and continue_final_message exclude each other", remedy="set one of them"
        )
    if begins is False and continues is not True:
        raise LineError(
            "add_generation_prompt = false is not supported alone",
            remedy="leave it out, or set continue_final_message to true",
        )


def _only(values: tuple[Any, ...]) -> str:
    accepted = " or ".join(json.dumps(value) for value in values)
    return f"leave it out{f', or use {accepted}' if accepted else ''}"


def _text(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise LineError(f"{key} is not text")
    return value


def _integer(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise LineError(f"{key} is not a whole number")
    return value


def _number(key: str, value: object) -> float:
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
    return tuple(_text(key, item) for item in (value if isinstance(value, list) else [value]))


def _seed(key: str, value: object) -> int:
    # OpenAI allows signed 64-bit integers.
    return _integer(key, value) % (MAX_SEED + 1)


def _limit(key: str, value: object) -> int | None:
    # In llama.cpp -1 means no limit.
    number = _integer(key, value)
    return None if number == -1 else number


def _top_k(key: str, value: object) -> int:
    # In vLLM -1 turns it off.
    number = _integer(key, value)
    return 0 if number == -1 else number


def _bias(key: str, value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise LineError(f"{key} is not an object of token ids")
    pairs = []
    for name, bias in value.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise LineError(f"{key}: {safe_line(name, 20)!r} is not a token id")
        pairs.append((int(name), _number(key, bias)))
    return tuple(pairs)


def _schema(key: str, value: object) -> str:
    """Return a schema as text. The line may hold it as text or as JSON."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | bool):
        raise LineError(f"{key} is not a JSON schema")
    return json.dumps(value)


def _prompt(key: str, value: object) -> str | tuple[int, ...]:
    if not isinstance(value, list):
        return _text(key, value)
    if not value:
        raise LineError(f"{key} is an empty list")
    if all(isinstance(item, str | list) for item in value):
        if len(value) > 1:
            raise LineError(f"{key} is a list of {len(value)} prompts", remedy="put each on its own line")
        return _prompt(key, value[0])
    return tuple(_integer(key, item) for item in value)


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
    role = _text("role", item["role"])
    if role not in _ROLES:
        raise LineError(f"the role {safe_line(role, 40)!r} is not supported")
    key = next((key for key in _REASONING_KEYS if item.get(key)), "")
    reasoning = _text(key, item[key]) if key else ""
    if key and role != "assistant":
        raise LineError(f"only messages of the assistant may have {key}")
    return Message(_ROLES[role], _content(item["content"]), reasoning_content=reasoning)


def _content(value: object) -> str:
    if not isinstance(value, list):
        return _text("content", value)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise LineError(f"content of the type {safe_line(str(kind), 40)!r} is not supported")
        texts.append(_text("content", part.get("text")))
    return "\n".join(texts)


def _variables(key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise LineError(f"{key} is not an object")
    return value


def _effort(key: str, value: object) -> Parts:
    """Read OpenAI's `reasoning_effort`. Models differ in what they make of the other levels."""
    if value != "none":
        raise LineError(
            f"{key} is not supported", remedy='use reasoning_budget, or chat_template_kwargs; or "none"'
        )
    return {"reasoning_budget": 0}


def _logprobs(key: str, value: object) -> Parts:
    """Read a boolean, as chat has it, or the number of alternatives, as completions have it."""
    if isinstance(value, bool):
        return {"logprobs": value}
    return {"logprobs": True, "top_logprobs": _integer(key, value)}


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
    """Read vLLM's newer form of `guided_json` and `guided_grammar`."""
    if not isinstance(value, dict):
        raise LineError(f"{key} is not an object")
    known: dict[str, Reader] = {"json": _to("json_schema", _schema), "grammar": _to("grammar", _text)}
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


_INTEGERS = ("repeat_last_n", "mirostat")
HONOURED: Mapping[str, Reader] = {
    "prompt": _to("prompt", _prompt),
    "messages": _to("prompt", _messages),
    "max_tokens": _to("max_tokens", _integer),
    "max_completion_tokens": _to("max_tokens", _integer),
    "n_predict": _to("max_tokens", _limit),
    "stop": _to("stop", _stop),
    "n": _to("n", _integer),
    "logprobs": _logprobs,
    "top_logprobs": _to("top_logprobs", _integer),
    "logit_bias": _to("logit_bias", _bias),
    "response_format": _response_format,
    "structured_outputs": _structured,
    "json_schema": _to("json_schema", _schema),
    "guided_json": _to("json_schema", _schema),
    "grammar": _to("grammar", _text),
    "guided_grammar": _to("grammar", _text),
    "context_shift": _to("context_shift", _flag),
    "chat_template_kwargs": _to("chat_template_kwargs", _variables),
    "reasoning_budget": _to("reasoning_budget", _limit),
    "reasoning_effort": _effort,
    "continue_final_message": _to("continue_final_message", _flag),
    # _check_beginning has checked that this agrees with continue_final_message.
    "add_generation_prompt": lambda key, value: {"continue_final_message": not _flag(key, value)},
    **{
        item.name: _to(item.name, _integer if item.name in _INTEGERS else _number)
        for item in fields(SamplingParameters)
    },
    "temp": _to("temperature", _number),
    "repetition_penalty": _to("repeat_penalty", _number),
    "seed": _to("seed", _seed),
    "top_k": _to("top_k", _top_k),
}
IGNORED = frozenset(
    {
        "model",  # the loaded model answers; a note says so
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
"""Fields that do not change the reply."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "web_search_options": (),
    "include_reasoning": (True,),
    "reasoning_format": ("auto", "deepseek"),
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
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "logits_processors": ([],),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "guided_regex": (),
    "guided_choice": (),
    "guided_whitespace_pattern": (),
}
"""Unsupported fields. Each is accepted only with null or one of these values, which have no effect."""
_NEUTRAL_IN: Mapping[bool, Mapping[str, tuple[Any, ...]]] = {
    True: {"add_special_tokens": (False,)},
    False: {"add_special_tokens": (True,)},
}
_KNOWN = HONOURED.keys() | IGNORED | NEUTRAL.keys() | _ENVELOPE
