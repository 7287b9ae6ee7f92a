"""Turn lines into requests: OpenAI's batch lines and the short form."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from dsmoe_local.base.text import safe_line
from dsmoe_local.batch.lines import Line
from dsmoe_local.engine.types import Request
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.requests import (
    ENDPOINTS,
    KNOWN,
    RequestDefaults,
    check_endpoint,
    read_request,
    unknown_fields,
)

ENVELOPE = frozenset({"method", "url", "body"})
_IDS = frozenset({"id", "custom_id"})
_PROMPTS = frozenset({"prompt", "messages"})


def request_of(line: Line, defaults: RequestDefaults) -> Request:
    """Return the request that a line asks for. Raises RequestError, UsageError."""
    if line.error is not None:
        raise line.error
    body, chat = _envelope(line.values) if "body" in line.values else _short(line.values)
    if unknown := unknown_fields(body):
        raise RequestError(f"unknown field {safe_line(unknown[0], 40)!r}", remedy=_near(unknown[0], KNOWN))
    return read_request(line.id, body, defaults, chat=chat)


def request_values(values: Mapping[str, Any], extra: Collection[str]) -> Mapping[str, Any]:
    """Return a line's fields without its id and without the `extra` fields that are not part of a request.

    The fields of its body are filtered likewise.
    """
    foreign = set(extra) - KNOWN - ENVELOPE
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
    if foreign := sorted(set(values) - ENVELOPE):
        raise RequestError(f"unknown field {safe_line(foreign[0], 40)!r} beside body")
    method, url, body = values.get("method", "POST"), values.get("url"), values["body"]
    if method != "POST":
        raise RequestError("method is not POST")
    if not isinstance(body, dict):
        raise RequestError("body is not an object")
    if not isinstance(url, str) or url not in ENDPOINTS:
        raise RequestError(
            f"the url {safe_line(str(url), 60)!r} is not supported",
            remedy=f"use {' or '.join(ENDPOINTS)}",
        )
    return body, check_endpoint(url, body)


def _short(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    chat = values.get("messages") is not None
    prompt = values.get("prompt") is not None
    if chat and prompt:
        raise RequestError("a line takes a prompt or messages, not both")
    if not chat and not prompt:
        unknown = [name for name in unknown_fields(values) if _near(name, _PROMPTS)]
        raise RequestError(
            "the line has no prompt and no messages", remedy=_near(unknown[0], _PROMPTS) if unknown else ""
        )
    return values, chat


def _near(name: str, known: Collection[str]) -> str:
    """Ask whether another field was meant; empty if no known field is similar."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else ""
