"""Lines to requests: OpenAI's batch lines and the short ones. Fields are `fields`', reading is `sources`'."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.fields import HONOURED, IGNORED, NEUTRAL, read_fields
from dsmoe_local.batch.lines import Line, LineError
from dsmoe_local.engine.types import Message, Request, SamplingParameters

_ENDPOINTS = {"/v1/chat/completions": True, "/v1/completions": False}
_ENVELOPE = frozenset({"method", "url", "body"})
_KNOWN = HONOURED.keys() | IGNORED | NEUTRAL.keys() | _ENVELOPE
_IDS = frozenset({"id", "custom_id"})
_SAMPLING = frozenset(item.name for item in fields(SamplingParameters))


@dataclass(frozen=True, slots=True)
class BatchDefaults:
    """What a line that says nothing else gets."""

    sampling: SamplingParameters
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


def request_of(line: Line, defaults: BatchDefaults) -> Request:
    """The request that a line makes. Raises LineError, UsageError."""
    if line.error is not None:
        raise line.error
    body, chat = _envelope(line.values) if "body" in line.values else _short(line.values)
    parts = read_fields(body, chat=chat)
    sampling = {name: parts.pop(name) for name in _SAMPLING & parts.keys()}
    given: dict[str, Any] = {"max_tokens": defaults.max_tokens, "stop": defaults.stop} | parts
    chosen = replace(defaults.sampling, **sampling) if sampling else defaults.sampling
    return Request(line.id, sampling=chosen, **given)


def without_foreign(values: Mapping[str, Any], fields: Collection[str]) -> Mapping[str, Any]:
    """`values` without its id, and without those of `fields` that are no request's, also in its body."""
    foreign = {name for name in fields if name not in _KNOWN}
    rest = {name: value for name, value in values.items() if name not in foreign | _IDS}
    if foreign and isinstance(body := rest.get("body"), Mapping):
        rest["body"] = {name: value for name, value in body.items() if name not in foreign}
    return rest


def is_chat(request: Request) -> bool:
    """Whether it continues a conversation, not a text."""
    return not isinstance(request.prompt, str) and isinstance(request.prompt[0], Message)


def model_named(line: Line) -> str:
    """The model that a line asks for; empty if none."""
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
            remedy=f"known are {' and '.join(_ENDPOINTS)}",
        )
    chat = _ENDPOINTS[url]
    wanted, other = ("messages", "prompt") if chat else ("prompt", "messages")
    if body.get(wanted) is None or body.get(other) is not None:
        raise LineError(f"{url} takes {wanted}, and no {other}")
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
