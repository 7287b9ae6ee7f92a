"""OpenAI's completions: as a whole, and streamed as chat.completion.chunk or parts of text_completion."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dsmoe_local.protocol.replies import Delta, Reply
from dsmoe_local.protocol.responses import (
    chat_scores,
    completion_scores,
    finish_word,
    response_body,
    timing_record,
    usage_with_details,
)
from dsmoe_local.protocol.tools import call_chunk
from dsmoe_local.protocol.writers import Event


class CompletionWriter:
    """Writes the reply to one request. `name` is the unique part of its id.

    With `usage`, every chunk has the key, as in OpenAI's API, and the last one has the counts.
    """

    done = b"data: [DONE]\n\n"

    def __init__(self, name: str, model: str, *, chat: bool, usage: bool, logprobs: bool) -> None:
        self._name = name
        self._chat = chat
        self._usage = usage
        self._logprobs = logprobs
        self._begun: set[int] = set()
        self._called: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._base: dict[str, Any] = {
            "id": f"chatcmpl-{name}" if chat else f"cmpl-{name}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        if usage:
            self._base["usage"] = None

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the completion."""
        return response_body(reply, self._name)

    def events(self, delta: Delta) -> list[Event]:
        """Return the chunks of a delta. In a chat, the first chunk of a reply has the role, and the one with
        the finish reason has no text.
        """
        if not self._chat:
            return [self._chunk(self._text_choice(delta))]
        parts: list[dict[str, Any]] = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            parts.append(_chat_choice(delta.index, {"role": "assistant", "content": ""}))
        content: dict[str, Any] = {}
        if delta.reasoning:
            content["reasoning_content"] = delta.reasoning
        if delta.text or delta.tokens:
            content["content"] = delta.text
        if content:
            choice = _chat_choice(delta.index, content)
            if self._logprobs:
                choice["logprobs"] = {"content": chat_scores(delta.tokens), "refusal": None}
            parts.append(choice)
        if delta.calls:
            self._called.add(delta.index)
            parts.append(_chat_choice(delta.index, {"tool_calls": [*map(call_chunk, delta.calls)]}))
        if delta.finish_reason is not None:
            word = finish_word(delta.finish_reason, calls=delta.index in self._called)
            parts.append(_chat_choice(delta.index, {}, word))
        return [self._chunk(part) for part in parts]

    def end(self, reply: Reply) -> list[Event]:
        """Return the chunk with the token counts, if they were asked for."""
        if not self._usage:
            return []
        counts = {"usage": usage_with_details(reply), "timing": timing_record(reply)}
        return [("", {**self._base, "choices": [], **counts})]

    def failure(self, error: Mapping[str, Any]) -> Event:
        """Return the event for an error."""
        return "", error

    def _chunk(self, choice: dict[str, Any]) -> Event:
        return "", {**self._base, "choices": [choice]}

    def _text_choice(self, delta: Delta) -> dict[str, Any]:
        scores = None
        if self._logprobs:
            offset = self._offsets.get(delta.index, 0)
            scores, self._offsets[delta.index] = completion_scores(delta.tokens, offset)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": scores,
            "finish_reason": None
            if delta.finish_reason is None
            else finish_word(delta.finish_reason, calls=False),
        }


def _chat_choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
