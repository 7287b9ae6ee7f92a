"""The two formats of output records: OpenAI's batch responses and a simple one. Both must stay compatible."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NotRequired, TypeAlias, TypedDict

from dsmoe_local.protocol.replies import Reply
from dsmoe_local.protocol.responses import (
    TimingRecord,
    UsageRecord,
    chat_scores,
    response_body,
    timing_record,
    usage_record,
)
from dsmoe_local.protocol.tools import call_record


class ErrorRecord(TypedDict):
    """Why a line has no reply. `line` counts from 1."""

    code: str
    message: str
    line: int


class Response(TypedDict):
    """The response to a successful request. `body` is a chat.completion or a text_completion."""

    status_code: int
    request_id: str
    body: dict[str, Any]


class OpenAiRecord(TypedDict):
    """A line of OpenAI's batch output. `kept` exists with `--keep`."""

    id: str
    custom_id: str
    response: Response | None
    error: ErrorRecord | None
    kept: NotRequired[Mapping[str, Any]]


class SimpleRecord(TypedDict):
    """A line of `--format simple`. With `n` > 1 texts, reasoning, calls and reasons are lists.
    `reasoning_content` and `tool_calls` exist if there are any, `logprobs` if the request asked for them,
    `kept` with `--keep`.
    """

    id: str
    text: str | list[str] | None
    finish_reason: str | list[str] | None
    usage: UsageRecord | None
    timing: TimingRecord | None
    error: ErrorRecord | None
    reasoning_content: NotRequired[str | list[str]]
    tool_calls: NotRequired[list[Any]]
    logprobs: NotRequired[list[Any]]
    kept: NotRequired[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Failure:
    """A line without a reply. `kind` is the kind of failure under which the summary counts it."""

    id: str
    line: int
    code: str
    message: str
    kind: str


Outcome: TypeAlias = Reply | Failure


def openai_record(outcome: Outcome) -> OpenAiRecord:
    """Return the record of `--format openai`."""
    name = uuid.uuid4().hex
    record = OpenAiRecord(id=f"batch_req_{name}", custom_id=outcome.id, response=None, error=None)
    if isinstance(outcome, Failure):
        record["error"] = _error(outcome)
    else:
        body = response_body(outcome, name)
        record["response"] = Response(status_code=200, request_id=f"req_{name}", body=body)
    return record


def simple_record(outcome: Outcome) -> SimpleRecord:
    """Return the record of `--format simple`."""
    record = SimpleRecord(id=outcome.id, text=None, finish_reason=None, usage=None, timing=None, error=None)
    if isinstance(outcome, Failure):
        record["error"] = _error(outcome)
        return record
    texts = [choice.text for choice in outcome.choices]
    reasons = [choice.finish_reason.value for choice in outcome.choices]
    scores = [chat_scores(choice.tokens) for choice in outcome.choices if choice.tokens is not None]
    single = len(outcome.choices) == 1
    record["text"] = texts[0] if single else texts
    record["finish_reason"] = reasons[0] if single else reasons
    record["usage"], record["timing"] = usage_record(outcome), timing_record(outcome)
    if any(choice.reasoning for choice in outcome.choices):
        reasoning = [choice.reasoning for choice in outcome.choices]
        record["reasoning_content"] = reasoning[0] if single else reasoning
    if any(choice.calls for choice in outcome.choices):
        calls = [[call_record(call) for call in choice.calls] for choice in outcome.choices]
        record["tool_calls"] = calls[0] if single else calls
    if scores:
        record["logprobs"] = scores[0] if single else scores
    return record


FORMATS: Mapping[str, Callable[[Outcome], OpenAiRecord | SimpleRecord]] = {
    "openai": openai_record,
    "simple": simple_record,
}


def _error(failure: Failure) -> ErrorRecord:
    return ErrorRecord(code=failure.code, message=failure.message, line=failure.line)
