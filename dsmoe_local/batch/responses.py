"""The two formats of output records: OpenAI's batch responses and a simple one. Both must stay compatible."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from dsmoe_local.engine.types import FinishReason, TokenLogprob, Usage

ScoredToken: TypeAlias = tuple[TokenLogprob, tuple[TokenLogprob, ...]]
"""A generated token, and its most likely alternatives."""

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this number


class CompletionDetails(TypedDict):
    """What completion tokens consist of, with OpenAI's names."""

    reasoning_tokens: int


class UsageRecord(TypedDict):
    """Token counts, with OpenAI's names. The details exist if there was reasoning."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: NotRequired[CompletionDetails]


class TimingRecord(TypedDict):
    """Wall time in seconds: in total from submission, for prefill, and for decoding."""

    seconds: float
    prompt_seconds: float
    completion_seconds: float
    tokens_per_second: float


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
    """A line of `--format simple`. With `n` > 1 texts, reasoning and reasons are lists. `reasoning_content`
    exists if there is any, `logprobs` if the request asked for them, `kept` with `--keep`.
    """

    id: str
    text: str | list[str] | None
    finish_reason: str | list[str] | None
    usage: UsageRecord | None
    timing: TimingRecord | None
    error: ErrorRecord | None
    reasoning_content: NotRequired[str | list[str]]
    logprobs: NotRequired[list[Any]]
    kept: NotRequired[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Choice:
    """One reply to a prompt. `tokens` are those of `text`; None without log-probabilities."""

    text: str
    finish_reason: FinishReason
    tokens: tuple[ScoredToken, ...] | None = None
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """The replies to a request. `chat`: it had messages, not a prompt. `usages` has one item for each choice,
    `kept` the fields of its line that are copied to the record.
    """

    id: str
    model: str
    chat: bool
    choices: tuple[Choice, ...]
    usages: tuple[Usage, ...]
    seconds: float
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompt, which all choices share."""
        return self.usages[0].prompt_tokens

    @property
    def n_cached_tokens(self) -> int:
        """Prompt tokens that were in the KV cache."""
        return self.usages[0].cached_tokens

    @property
    def n_completion_tokens(self) -> int:
        """Generated tokens of all choices."""
        return sum(usage.completion_tokens for usage in self.usages)

    @property
    def n_reasoning_tokens(self) -> int:
        """Tokens of reasoning in all choices."""
        return sum(usage.reasoning_tokens for usage in self.usages)


@dataclass(frozen=True, slots=True)
class Failure:
    """A line without a reply. `kind` is the kind of failure under which the summary counts it."""

    id: str
    line: int
    code: str
    message: str
    kind: str
    kept: Mapping[str, Any] = field(default_factory=dict)


Outcome: TypeAlias = Reply | Failure


def openai_record(outcome: Outcome) -> OpenAiRecord:
    """Return the record of `--format openai`."""
    name = uuid.uuid4().hex
    record = OpenAiRecord(id=f"batch_req_{name}", custom_id=outcome.id, response=None, error=None)
    if isinstance(outcome, Failure):
        record["error"] = _error(outcome)
    else:
        record["response"] = Response(status_code=200, request_id=f"req_{name}", body=_body(outcome, name))
    if outcome.kept:
        record["kept"] = outcome.kept
    return record


def simple_record(outcome: Outcome) -> SimpleRecord:
    """Return the record of `--format simple`."""
    record = SimpleRecord(id=outcome.id, text=None, finish_reason=None, usage=None, timing=None, error=None)
    if outcome.kept:
        record["kept"] = outcome.kept
    if isinstance(outcome, Failure):
        record["error"] = _error(outcome)
        return record
    texts = [choice.text for choice in outcome.choices]
    reasons = [choice.finish_reason.value for choice in outcome.choices]
    scores = [_chat_scores(choice.tokens) for choice in outcome.choices if choice.tokens is not None]
    single = len(outcome.choices) == 1
    record["text"] = texts[0] if single else texts
    record["finish_reason"] = reasons[0] if single else reasons
    record["usage"], record["timing"] = _usage(outcome), _timing(outcome)
    if any(choice.reasoning for choice in outcome.choices):
        reasoning = [choice.reasoning for choice in outcome.choices]
        record["reasoning_content"] = reasoning[0] if single else reasoning
    if scores:
        record["logprobs"] = scores[0] if single else scores
    return record


FORMATS: Mapping[str, Callable[[Outcome], OpenAiRecord | SimpleRecord]] = {
    "openai": openai_record,
    "simple": simple_record,
}


def _body(reply: Reply, name: str) -> dict[str, Any]:
    choices = [_choice(reply, index, choice) for index, choice in enumerate(reply.choices)]
    return {
        "id": f"chatcmpl-{name}" if reply.chat else f"cmpl-{name}",
        "object": "chat.completion" if reply.chat else "text_completion",
        "created": int(time.time()),
        "model": reply.model,
        "choices": choices,
        "usage": {
            **_usage(reply),
            "prompt_tokens_details": {"cached_tokens": reply.n_cached_tokens},
        },
        "timing": _timing(reply),
    }


def _choice(reply: Reply, index: int, choice: Choice) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": index,
        "logprobs": None,
        "finish_reason": _ending(choice.finish_reason),
    }
    if reply.chat:
        record["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.reasoning:
            # Not OpenAI's, but that of DeepSeek, vLLM and llama.cpp.
            record["message"]["reasoning_content"] = choice.reasoning
        if choice.tokens is not None:
            record["logprobs"] = {"content": _chat_scores(choice.tokens), "refusal": None}
    else:
        record["text"] = choice.text
        if choice.tokens is not None:
            record["logprobs"] = _completion_scores(choice.tokens)
    return record


def _chat_scores(tokens: tuple[ScoredToken, ...]) -> list[dict[str, Any]]:
    return [
        {**_score(token), "top_logprobs": [_score(other) for other in others]} for token, others in tokens
    ]


def _score(token: TokenLogprob) -> dict[str, Any]:
    # A token that is part of a character has no text, and its bytes are not known here.
    whole = "\N{REPLACEMENT CHARACTER}" not in token.text
    return {
        "token": token.text,
        "logprob": _finite(token.logprob),
        "bytes": list(token.text.encode()) if whole else None,
    }


def _completion_scores(tokens: tuple[ScoredToken, ...]) -> dict[str, Any]:
    offsets, offset = [], 0
    for token, _ in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token, _ in tokens],
        "token_logprobs": [_finite(token.logprob) for token, _ in tokens],
        "top_logprobs": [{other.text: _finite(other.logprob) for other in others} for _, others in tokens],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def _ending(reason: FinishReason) -> Literal["stop", "length"]:
    # OpenAI uses "length" for a full context as well.
    return "stop" if reason is FinishReason.STOP else "length"


def _usage(reply: Reply) -> UsageRecord:
    record = UsageRecord(
        prompt_tokens=reply.n_prompt_tokens,
        completion_tokens=reply.n_completion_tokens,
        total_tokens=reply.n_prompt_tokens + reply.n_completion_tokens,
    )
    if reply.n_reasoning_tokens:
        record["completion_tokens_details"] = CompletionDetails(reasoning_tokens=reply.n_reasoning_tokens)
    return record


def _timing(reply: Reply) -> TimingRecord:
    return TimingRecord(
        seconds=round(reply.seconds, 4),
        prompt_seconds=round(max(usage.prompt_seconds for usage in reply.usages), 4),
        completion_seconds=round(max(usage.completion_seconds for usage in reply.usages), 4),
        tokens_per_second=round(sum(usage.tokens_per_second for usage in reply.usages), 2),
    )


def _error(failure: Failure) -> ErrorRecord:
    return ErrorRecord(code=failure.code, message=failure.message, line=failure.line)
