"""The events of a chat completion, streamed by a server."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from dsmoe_local.base.text import safe_line
from dsmoe_local.chat.remote.connection import (
    TEXT_IS_KEPT,
    ServerError,
    error_of,
    in_words,
    lost_during_reply,
)
from dsmoe_local.engine.types import CallDelta, FinishReason, Request, TokenEvent, Usage

_MAX_LINE = 16 << 20  # bytes
_FIELDS = (b"event:", b"id:", b"retry:", b":")  # fields of an event that do not matter here


class Lines(Protocol):
    """The body of a response."""

    def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes."""
        ...

    def readline(self, limit: int = -1, /) -> bytes:
        """Return the next line with its end; nothing at the end of the body."""
        ...


@dataclass(slots=True)
class CompletionStream:
    """Reads one reply. `ended` is called with the finish reason: only token counts may follow."""

    request: Request
    ended: Callable[[], None]
    began: float = field(default_factory=time.perf_counter)
    _is_ended: bool = False
    _first: float | None = None
    _reason: FinishReason = FinishReason.STOP
    _usage: dict[str, Any] | None = None

    def events(self, body: Lines) -> Iterator[TokenEvent]:
        """Yield the reply's events. Raises ServerError if the stream is malformed, or ends early.

        After the finish reason, a server may also keep the connection open without a word.
        """
        try:
            for data in _data_of(body):
                if data == b"[DONE]":
                    self._is_ended = True
                    break
                yield from self._chunk(data)
        except ServerError:
            if not self._is_ended:
                raise
        if not self._is_ended:
            raise lost_during_reply("the connection was closed")
        yield self._end()

    def whole(self, body: Lines) -> Iterator[TokenEvent]:
        """Yield the events of a reply that was not streamed. Raises ServerError."""
        try:
            raw = body.read(_MAX_LINE)
        except (OSError, http.client.HTTPException) as error:
            raise lost_during_reply(in_words(error)) from error
        yield from self._chunk(raw)
        yield self._end()

    def _chunk(self, raw: bytes) -> Iterator[TokenEvent]:
        try:
            chunk = json.loads(raw)
            if error := error_of(chunk):
                raise ServerError(f"the server ended the reply: {error[0]}", remedy=TEXT_IS_KEPT)
            if isinstance(chunk.get("usage"), dict):
                self._usage = chunk["usage"]
            for choice in chunk.get("choices") or ():
                if choice.get("index", 0) == 0:
                    yield from self._part(choice)
        except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
            raise _garbage(raw) from error

    def _part(self, choice: dict[str, Any]) -> Iterator[TokenEvent]:
        delta = choice.get("delta") or choice.get("message") or {}
        text, calls = _text(delta, "content"), tuple(map(_call, delta.get("tool_calls") or ()))
        reasoning = _text(delta, "reasoning_content") or _text(delta, "reasoning")
        if text or reasoning or calls:
            seconds = time.perf_counter() - self.began
            if self._first is None:
                self._first = seconds
            yield TokenEvent(self.request.id, text, seconds, reasoning=reasoning, calls=calls)
        reason = choice.get("finish_reason")
        if reason is not None:
            self._is_ended = True
            self.ended()
            self._reason = FinishReason.LENGTH if reason == "length" else FinishReason.STOP

    def _end(self) -> TokenEvent:
        seconds = time.perf_counter() - self.began
        return TokenEvent(
            self.request.id, "", seconds, finish_reason=self._reason, usage=self._usage_of(seconds)
        )

    def _usage_of(self, seconds: float) -> Usage | None:
        """Return the server's token counts with the times that were measured here; None without counts."""
        if self._usage is None:
            return None
        first = seconds if self._first is None else self._first
        return Usage(
            prompt_tokens=_count(self._usage, "prompt_tokens"),
            cached_tokens=_count(self._usage.get("prompt_tokens_details"), "cached_tokens"),
            completion_tokens=_count(self._usage, "completion_tokens"),
            prompt_seconds=first,
            completion_seconds=seconds - first,
            seed=self.request.sampling.seed,
            reasoning_tokens=_count(self._usage.get("completion_tokens_details"), "reasoning_tokens"),
        )


def _data_of(body: Lines) -> Iterator[bytes]:
    """Yield the data of server-sent events. An event may have several lines of data."""
    parts: list[bytes] = []
    while True:
        try:
            line = body.readline(_MAX_LINE)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise lost_during_reply(in_words(error)) from error
        stripped = line.rstrip(b"\r\n")
        if stripped.startswith(b"data:"):
            parts.append(stripped.removeprefix(b"data:").strip())
        elif stripped and not stripped.startswith(_FIELDS):
            raise _garbage(stripped)
        if (not stripped or stripped == b"data: [DONE]") and parts:
            yield b"\n".join(parts)
            parts = []
        if not line:
            return


def _garbage(raw: bytes) -> ServerError:
    return ServerError(
        "the server sends something else than a chat completion",
        where=safe_line(raw[:120].decode("utf-8", "replace"), 100),
        remedy="check that the URL is that of OpenAI's API",
    )


def _text(delta: dict[str, Any], key: str) -> str:
    value = delta.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise TypeError(key)
    # A lone surrogate, which JSON may contain, could not be stored.
    return value.encode("utf-8", "replace").decode()


def _call(part: dict[str, Any]) -> CallDelta:
    function = part.get("function") or {}
    return CallDelta(
        int(part.get("index") or 0),
        _text(function, "arguments"),
        _text(part, "id"),
        safe_line(_text(function, "name"), 128),
    )


def _count(counts: object, key: str) -> int:
    value = counts.get(key) if isinstance(counts, dict) else None
    return value if isinstance(value, int) and value >= 0 else 0
