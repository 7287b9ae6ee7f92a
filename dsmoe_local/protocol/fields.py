"""The fields of a request body, and how each is read.

A field is honoured, ignored because it does not change a reply, or refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import MAX_SEED, SamplingParameters
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.messages import messages
from dsmoe_local.protocol.values import flag, integer, json_object, number, text

Parts: TypeAlias = dict[str, Any]
"""Attributes of Request and of SamplingParameters, by name."""
Reader: TypeAlias = Callable[[str, object], Parts]
"""Takes the name and the value of a field. Raises RequestError."""


def _stop(key: str, value: object) -> tuple[str, ...]:
    return tuple(text(key, item) for item in (value if isinstance(value, list) else [value]))


def _seed(key: str, value: object) -> int | None:
    # OpenAI allows signed 64-bit integers. In llama.cpp -1 means a random seed.
    seed = integer(key, value)
    return None if seed == -1 else seed % (MAX_SEED + 1)


def _limit(key: str, value: object) -> int | None:
    # In llama.cpp -1 means no limit.
    limit = integer(key, value)
    return None if limit == -1 else limit


def _top_k(key: str, value: object) -> int:
    # In vLLM -1 turns it off.
    top_k = integer(key, value)
    return 0 if top_k == -1 else top_k


def _bias(key: str, value: object) -> tuple[tuple[int, float], ...]:
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        # llama.cpp's form
        return tuple((integer(key, token_id), number(key, bias)) for token_id, bias in value)
    if not isinstance(value, dict):
        raise RequestError(f"{key} is not an object of token ids")
    pairs = []
    for name, bias in value.items():
        if not name.isascii() or not name.isdigit() or len(name) > 9:
            raise RequestError(f"{key}: {safe_line(name, 20)!r} is not a token id")
        pairs.append((int(name), number(key, bias)))
    return tuple(pairs)


def _schema(key: str, value: object) -> str:
    """Return a schema as text. It may be given as text or as JSON."""
    if isinstance(value, str):
        return value
    if not isinstance(value, dict | bool):
        raise RequestError(f"{key} is not a JSON schema")
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        # Scripts can pass values that JSON does not have.
        raise RequestError(f"{key} is not JSON: {safe_line(str(error), 80)}") from error


def _prompt(key: str, value: object) -> str | tuple[int, ...]:
    if not isinstance(value, list):
        return text(key, value)
    if not value:
        raise RequestError(f"{key} is an empty list", param=key)
    if all(isinstance(item, str | list) for item in value):
        if len(value) > 1:
            raise RequestError(f"{key} is a list of {len(value)} prompts", remedy="send a request for each")
        return _prompt(key, value[0])
    return tuple(integer(key, item) for item in value)


def _effort(key: str, value: object) -> Parts:
    """Read OpenAI's `reasoning_effort`. Models differ in what they make of the other levels."""
    if value != "none":
        raise RequestError(
            f"{key} is not supported", remedy='use reasoning_budget, or chat_template_kwargs; or "none"'
        )
    return {"reasoning_budget": 0}


def _logprobs(key: str, value: object) -> Parts:
    """Read a boolean, as chat has it, or the number of alternatives, as completions have it."""
    if isinstance(value, bool):
        return {"logprobs": value}
    return {"logprobs": True, "top_logprobs": integer(key, value)}


def _response_format(key: str, value: object) -> Parts:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        # The schema is an addition of llama.cpp.
        schema = value.get("schema") if isinstance(value, dict) else None
        return {"json_schema": '{"type": "object"}' if schema is None else _schema(f"{key}.schema", schema)}
    wrapped = value.get("json_schema") if isinstance(value, dict) else None
    if kind != "json_schema" or not isinstance(wrapped, dict) or "schema" not in wrapped:
        raise RequestError(
            f"{key} is not supported", remedy="it takes text, json_object, or json_schema with a schema"
        )
    return {"json_schema": _schema(f"{key}.json_schema.schema", wrapped["schema"])}


def _structured(key: str, value: object) -> Parts:
    """Read vLLM's newer form of `guided_json` and `guided_grammar`."""
    known: dict[str, Reader] = {"json": _to("json_schema", _schema), "grammar": _to("grammar", text)}
    parts: Parts = {}
    for name, part in json_object(key, value).items():
        if part is None:
            continue
        if name not in known:
            raise RequestError(f"{key}.{safe_line(name, 40)} is not supported")
        parts |= known[name](f"{key}.{name}", part)
    return parts


def _to(target: str, convert: Callable[[str, object], Any]) -> Reader:
    return lambda key, value: {target: convert(key, value)}


_INTEGERS = ("repeat_last_n", "mirostat")
HONOURED: Mapping[str, Reader] = {
    "prompt": _to("prompt", _prompt),
    "messages": _to("prompt", messages),
    "max_tokens": _to("max_tokens", _limit),
    "max_completion_tokens": _to("max_tokens", _limit),
    "n_predict": _to("max_tokens", _limit),
    "stop": _to("stop", _stop),
    "n": _to("n", integer),
    "echo": _to("echo", flag),
    "logprobs": _logprobs,
    "top_logprobs": _to("top_logprobs", integer),
    "logit_bias": _to("logit_bias", _bias),
    "response_format": _response_format,
    "structured_outputs": _structured,
    "json_schema": _to("json_schema", _schema),
    "guided_json": _to("json_schema", _schema),
    "grammar": _to("grammar", text),
    "guided_grammar": _to("grammar", text),
    "context_shift": _to("context_shift", flag),
    "chat_template_kwargs": _to("chat_template_kwargs", json_object),
    "reasoning_budget": _to("reasoning_budget", _limit),
    "reasoning_effort": _effort,
    "continue_final_message": _to("continue_final_message", flag),
    # `requests` has checked that this agrees with continue_final_message.
    "add_generation_prompt": lambda key, value: {"continue_final_message": not flag(key, value)},
    **{
        item.name: _to(item.name, integer if item.name in _INTEGERS else number)
        for item in fields(SamplingParameters)
    },
    "temp": _to("temperature", number),
    "repetition_penalty": _to("repeat_penalty", number),
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
        "guided_decoding_backend",
    }
)
"""Fields that do not change the reply."""
TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
"""Fields of conversations, which `protocol.tools` reads together."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
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
NEUTRAL_IN: Mapping[bool, Mapping[str, tuple[Any, ...]]] = {
    True: {"add_special_tokens": (False,)},
    False: {"add_special_tokens": (True,)},
}
