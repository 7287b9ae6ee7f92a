"""OpenAI's response bodies: chat.completion and text_completion. Clients depend on their form."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

from dsmoe_local.engine.types import FinishReason, TokenLogprob
from dsmoe_local.protocol.replies import Choice, Reply, ScoredToken
from dsmoe_local.protocol.tools import call_record

_LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI writes this number


def response_body(reply: Reply, name: str) -> dict[str, Any]:
    """Return the body of a response. `name` is the unique part of its id."""
    choices = [_choice(reply, index, choice) for index, choice in enumerate(reply.choices)]
    return {
        "id": f"chatcmpl-{name}" if reply.chat else f"cmpl-{name}",
        "object": "chat.completion" if reply.chat else "text_completion",
        "created": int(time.time()),
        "model": reply.model,
        "choices": choices,
        "usage": usage_with_details(reply),
        "timing": timing_record(reply),
    }


def _choice(reply: Reply, index: int, choice: Choice) -> dict[str, Any]:
    record: dict[str, Any] = {
        "index": index,
        "logprobs": None,
        "finish_reason": finish_word(choice.finish_reason, calls=bool(choice.calls)),
    }
    if reply.chat:
        content = None if choice.calls and not choice.text else choice.text
        record["message"] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            record["message"]["tool_calls"] = [call_record(call) for call in choice.calls]
        if choice.reasoning:
            # Not OpenAI's, but that of DeepSeek, vLLM and llama.cpp.
            record["message"]["reasoning_content"] = choice.reasoning
        if choice.tokens is not None:
            record["logprobs"] = {"content": chat_scores(choice.tokens), "refusal": None}
    else:
        record["text"] = choice.text
        if choice.tokens is not None:
            record["logprobs"] = completion_scores(choice.tokens)[0]
    return record


def chat_scores(tokens: tuple[ScoredToken, ...]) -> list[dict[str, Any]]:
    """Return log-probabilities in the form of chat.completion."""
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


def completion_scores(tokens: tuple[ScoredToken, ...], offset: int = 0) -> tuple[dict[str, Any], int]:
    """Return log-probabilities in the form of text_completion, and the offset in characters after the tokens.

    `offset` is that of the first token.
    """
    offsets = []
    for token, _ in tokens:
        offsets.append(offset)
        offset += len(token.text)
    scores = {
        "tokens": [token.text for token, _ in tokens],
        "token_logprobs": [
            None if math.isnan(token.logprob) else _finite(token.logprob) for token, _ in tokens
        ],
        "top_logprobs": [
            None if math.isnan(token.logprob) else _by_text(token, others) for token, others in tokens
        ],
        "text_offset": offsets,
    }
    return scores, offset


def _by_text(token: TokenLogprob, others: tuple[TokenLogprob, ...]) -> dict[str, float]:
    """Return the alternatives by text. Of several with one text, such as parts of characters, the chosen
    token's value is kept, or that of the likeliest.
    """
    found: dict[str, float] = {}
    for other in others:
        found.setdefault(other.text, _finite(other.logprob))
    if token.text in found:
        found[token.text] = _finite(token.logprob)
    return found


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB


def finish_word(reason: FinishReason, *, calls: bool) -> Literal["stop", "length", "tool_calls"]:
    """Return OpenAI's word for why a reply ended, which may have tool calls."""
    if reason is FinishReason.STOP:
        return "tool_calls" if calls else "stop"
    # OpenAI uses "length" for a full context as well.
    return "length"


def usage_record(reply: Reply) -> dict[str, Any]:
    """Return the token counts of a reply, with OpenAI's names. The details exist if there was reasoning."""
    record: dict[str, Any] = {
        "prompt_tokens": reply.n_prompt_tokens,
        "completion_tokens": reply.n_completion_tokens,
        "total_tokens": reply.n_prompt_tokens + reply.n_completion_tokens,
    }
    if reply.n_reasoning_tokens:
        record["completion_tokens_details"] = {"reasoning_tokens": reply.n_reasoning_tokens}
    return record


def usage_with_details(reply: Reply) -> dict[str, Any]:
    """Return the token counts of a reply, with the cached ones."""
    return {**usage_record(reply), "prompt_tokens_details": {"cached_tokens": reply.n_cached_tokens}}


def timing_record(reply: Reply) -> dict[str, float]:
    """Return wall times of a reply in seconds: in total from submission, for prefill, and for decoding."""
    return {
        "seconds": round(reply.seconds, 4),
        "prompt_seconds": round(max(usage.prompt_seconds for usage in reply.usages), 4),
        "completion_seconds": round(max(usage.completion_seconds for usage in reply.usages), 4),
        "tokens_per_second": round(sum(usage.tokens_per_second for usage in reply.usages), 2),
    }
