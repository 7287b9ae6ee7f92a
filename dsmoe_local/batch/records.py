"""The two formats of output records: OpenAI's batch responses and a simple one. Both must stay compatible."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsmoe_local.protocol.replies import Reply
from dsmoe_local.protocol.responses import chat_scores, response_body, timing_record, usage_record
from dsmoe_local.protocol.tools import call_record


@dataclass(frozen=True, slots=True)
class Failure:
    """A line without a reply. `kind` is the kind of failure under which the summary counts it."""

    id: str
    line: int
    code: str
    message: str
    kind: str


Outcome: TypeAlias = Reply | Failure


def openai_record(outcome: Outcome) -> dict[str, Any]:
    """Return the record of `--format openai`, whose body is a chat.completion or a text_completion."""
    name = uuid.uuid4().hex
    response = None
    if not isinstance(outcome, Failure):
        body = response_body(outcome, name)
        response = {"status_code": 200, "request_id": f"req_{name}", "body": body}
    error = _error(outcome)
    return {"id": f"batch_req_{name}", "custom_id": outcome.id, "response": response, "error": error}


def simple_record(outcome: Outcome) -> dict[str, Any]:
    """Return the record of `--format simple`. With `n` > 1, what each reply has is a list.

    `reasoning_content`, `tool_calls` and `logprobs` exist if there are any.
    """
    record: dict[str, Any] = {
        "id": outcome.id,
        **dict.fromkeys(("text", "finish_reason", "usage", "timing")),
        "error": _error(outcome),
    }
    if isinstance(outcome, Failure):
        return record
    choices = outcome.choices
    of_each: dict[str, list[Any]] = {
        "text": [choice.text for choice in choices],
        "finish_reason": [choice.finish_reason.value for choice in choices],
    }
    if any(choice.reasoning for choice in choices):
        of_each["reasoning_content"] = [choice.reasoning for choice in choices]
    if any(choice.calls for choice in choices):
        of_each["tool_calls"] = [[call_record(call) for call in choice.calls] for choice in choices]
    if scores := [chat_scores(choice.tokens) for choice in choices if choice.tokens is not None]:
        of_each["logprobs"] = scores
    replies = {name: values[0] if len(choices) == 1 else values for name, values in of_each.items()}
    return record | replies | {"usage": usage_record(outcome), "timing": timing_record(outcome)}


def _error(outcome: Outcome) -> dict[str, Any] | None:
    """Return why a line has no reply; None if it has one."""
    if not isinstance(outcome, Failure):
        return None
    return {"code": outcome.code, "message": outcome.message, "line": outcome.line}


FORMATS: Mapping[str, Callable[[Outcome], dict[str, Any]]] = {
    "openai": openai_record,
    "simple": simple_record,
}
