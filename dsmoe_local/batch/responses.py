"""Output records in their two forms: OpenAI's batch responses, and a simple one. These forms stay."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from dsmoe_local.engine.types import FinishReason, Usage


class UsageRecord(TypedDict):
    """Token counts, as OpenAI names them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ErrorRecord(TypedDict):
    """Why a line has no reply. `line` counts from 1."""

    code: str
    message: str
    line: int


class Response(TypedDict):
    """What a successful request returned: `body` is a chat.completion or a text_completion."""

    status_code: int
    request_id: str
    body: dict[str, Any]


class OpenAiRecord(TypedDict):
    """A line of OpenAI's batch output."""

    id: str
    custom_id: str
    response: Response | None
    error: ErrorRecord | None


class SimpleRecord(TypedDict):
    """A line of `--format simple`."""

    id: str
    text: str | None
    finish_reason: str | None
    usage: UsageRecord | None
    error: ErrorRecord | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply. `chat`: to messages, else to a prompt."""

    id: str
    model: str
    chat: bool
    text: str
    finish_reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True)
class Failure:
    """A line without a reply."""

    id: str
    line: int
    code: str
    message: str


def openai_record(outcome: Reply | Failure) -> OpenAiRecord:
    """The record of `--format openai`."""
    name = uuid.uuid4().hex
    record = OpenAiRecord(id=f"batch_req_{name}", custom_id=outcome.id, response=None, error=None)
    if isinstance(outcome, Failure):
        record["error"] = _error(outcome)
    else:
        record["response"] = Response(status_code=200, request_id=f"req_{name}", body=_body(outcome, name))
    return record


def simple_record(outcome: Reply | Failure) -> SimpleRecord:
    """The record of `--format simple`."""
    if isinstance(outcome, Failure):
        return SimpleRecord(id=outcome.id, text=None, finish_reason=None, usage=None, error=_error(outcome))
    return SimpleRecord(
        id=outcome.id,
        text=outcome.text,
        finish_reason=outcome.finish_reason.value,
        usage=_usage(outcome.usage),
        error=None,
    )


FORMATS: Mapping[str, Callable[[Reply | Failure], OpenAiRecord | SimpleRecord]] = {
    "openai": openai_record,
    "simple": simple_record,
}


def _body(reply: Reply, name: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": _ending(reply.finish_reason)}
    if reply.chat:
        choice["message"] = {"role": "assistant", "content": reply.text, "refusal": None}
    else:
        choice["text"] = reply.text
    return {
        "id": f"chatcmpl-{name}" if reply.chat else f"cmpl-{name}",
        "object": "chat.completion" if reply.chat else "text_completion",
        "created": int(time.time()),
        "model": reply.model,
        "choices": [choice],
        "usage": {
            **_usage(reply.usage),
            "prompt_tokens_details": {"cached_tokens": reply.usage.cached_tokens},
        },
    }


def _ending(reason: FinishReason) -> Literal["stop", "length"]:
    # OpenAI's word for a full context is "length" too.
    return "stop" if reason is FinishReason.STOP else "length"


def _usage(usage: Usage) -> UsageRecord:
    return UsageRecord(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
    )


def _error(failure: Failure) -> ErrorRecord:
    return ErrorRecord(code=failure.code, message=failure.message, line=failure.line)
