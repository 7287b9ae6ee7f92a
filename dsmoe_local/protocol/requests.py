"""Read the body of an OpenAI request into a Request of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from dsmoe_local.engine.types import Request, SamplingParameters
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.fields import HONOURED, IGNORED, NEUTRAL, NEUTRAL_IN, TOOL_FIELDS, Parts
from dsmoe_local.protocol.tools import offered_tools
from dsmoe_local.protocol.values import missing

ENDPOINTS: Mapping[str, bool] = {"/v1/chat/completions": True, "/v1/completions": False}
"""By URL: True if the body has messages, False if it has a prompt."""
KNOWN = HONOURED.keys() | IGNORED | NEUTRAL.keys()
"""The names of all fields that have a meaning here."""
MAX_PROMPTS = 256
"""Prompts in one body."""
_SAMPLING = frozenset(item.name for item in fields(SamplingParameters))


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """Values for what a request does not set itself."""

    sampling: SamplingParameters
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    reasoning_budget: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)


def read_request(name: str, body: Mapping[str, Any], defaults: RequestDefaults, *, chat: bool) -> Request:
    """Return the request with the id `name` that a body asks for. `chat`: it has messages, not a prompt.

    Unknown fields are skipped (see `unknown_fields`). Raises RequestError, UsageError.
    """
    parts = _read_fields(body, chat=chat)
    sampling = {key: parts.pop(key) for key in _SAMPLING & parts.keys()}
    given: dict[str, Any] = {
        "max_tokens": defaults.max_tokens,
        "stop": defaults.stop,
        "reasoning_budget": defaults.reasoning_budget,
    } | parts
    if chat:
        given["tools"] = offered_tools(body)
    # As in llama.cpp's server, a request adds variables to those of the command.
    given["chat_template_kwargs"] = {**defaults.chat_template_kwargs, **parts.get("chat_template_kwargs", {})}
    chosen = replace(defaults.sampling, **sampling) if sampling else defaults.sampling
    return Request(name, sampling=chosen, **given)


def read_requests(
    name: str, body: Mapping[str, Any], defaults: RequestDefaults, *, chat: bool
) -> tuple[Request, ...]:
    """Return a request for each prompt of a body, in their order. Raises RequestError, UsageError."""
    given = body.get("prompt")
    prompts = given if isinstance(given, list) and not chat else []
    if len(prompts) < 2 or not all(isinstance(prompt, str | list) for prompt in prompts):
        return (read_request(name, body, defaults, chat=chat),)
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(
            f"prompt is a list of {len(prompts):,} prompts",
            remedy=f"send at most {MAX_PROMPTS} at once",
            param="prompt",
        )
    # The other fields are read only once: they are the same for all prompts, and some are large.
    first = read_request(name, {**body, "prompt": prompts[0]}, defaults, chat=False)
    others = [HONOURED["prompt"]("prompt", prompt)["prompt"] for prompt in prompts[1:]]
    return (first, *(first.with_prompt(f"{name}-{i}", prompt) for i, prompt in enumerate(others, 1)))


def check_endpoint(url: str, body: Mapping[str, Any]) -> bool:
    """Return whether the URL, one of ENDPOINTS, takes messages. RequestError if the body has the wrong kind
    of prompt.
    """
    chat = ENDPOINTS[url]
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if body.get(other) is not None:
        raise RequestError(f"{url} takes {wanted}, not {other}", param=wanted)
    if body.get(wanted) is None:
        raise missing(wanted, body)
    return chat


def unknown_fields(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of fields that have no meaning here, in the order of the body."""
    return tuple(key for key, value in body.items() if key not in KNOWN and value is not None)


def _read_fields(body: Mapping[str, Any], *, chat: bool) -> Parts:
    """Read the known fields of a body. RequestError names the first one that is not supported."""
    _check_beginning(body)
    parts: Parts = {}
    sources: dict[str, str] = {}
    for key, value in body.items():
        if value is None or key not in KNOWN or key in IGNORED or (chat and key in TOOL_FIELDS):
            continue
        try:
            found = _read_field(key, value, chat=chat)
        except RequestError as error:
            error.param = key
            raise
        for target, part in found.items():
            if target in sources and parts[target] != part:
                raise RequestError(f"{sources[target]} and {key} differ", param=key)
            parts[target] = part
            sources.setdefault(target, key)
    return parts


def _read_field(key: str, value: object, *, chat: bool) -> Parts:
    if key in HONOURED:
        return HONOURED[key](key, value)
    if value in (*NEUTRAL[key], *NEUTRAL_IN[chat].get(key, ())):
        return {}
    accepted = " or ".join(json.dumps(one) for one in NEUTRAL[key])
    raise RequestError(
        f"{key} is not supported", remedy=f"leave it out{f', or use {accepted}' if accepted else ''}"
    )


def _check_beginning(body: Mapping[str, Any]) -> None:
    """Raise RequestError if the flags contradict each other: as in vLLM, a reply either begins a new message
    or continues the last one.
    """
    begins, continues = body.get("add_generation_prompt"), body.get("continue_final_message")
    if begins is True and continues is True:
        raise RequestError(
            "add_generation_prompt and continue_final_message exclude each other",
            remedy="set one of them",
            param="add_generation_prompt",
        )
    if begins is False and continues is not True:
        raise RequestError(
            "add_generation_prompt = false is not supported alone",
            remedy="leave it out, or set continue_final_message to true",
            param="add_generation_prompt",
        )
