"""OpenAI's streamed responses: chat.completion.chunk, and text_completion in parts."""

from __future__ import annotations

import time
from typing import Any

from dsmoe_local.protocol.replies import Delta, Reply
from dsmoe_local.protocol.responses import (
    chat_scores,
    completion_scores,
    finish_word,
    timing_record,
    usage_with_details,
)


class ChunkWriter:
    """Makes the chunks of one response. `name` is the unique part of its id.

    With `usage`, every chunk has the key, as in OpenAI's API, and `last` returns a chunk with the counts.
    """

    def __init__(self, name: str, model: str, *, chat: bool, usage: bool, logprobs: bool) -> None:
        self._chat = chat
        self._usage = usage
        self._logprobs = logprobs
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}
        self._base: dict[str, Any] = {
            "id": f"chatcmpl-{name}" if chat else f"cmpl-{name}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        if usage:
            self._base["usage"] = None

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
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
        if delta.finish_reason is not None:
            parts.append(_chat_choice(delta.index, {}, finish_word(delta.finish_reason)))
        return [self._chunk(part) for part in parts]

    def last(self, reply: Reply) -> dict[str, Any] | None:
        """Return the chunk with the token counts, if they were asked for."""
        if not self._usage:
            return None
        return {
            **self._base,
            "choices": [],
            "usage": usage_with_details(reply),
            "timing": timing_record(reply),
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._base, "choices": [choice]}

    def _text_choice(self, delta: Delta) -> dict[str, Any]:
        scores = None
        if self._logprobs:
            offset = self._offsets.get(delta.index, 0)
            scores, self._offsets[delta.index] = completion_scores(delta.tokens, offset)
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": scores,
            "finish_reason": None if delta.finish_reason is None else finish_word(delta.finish_reason),
        }


def _chat_choice(index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
