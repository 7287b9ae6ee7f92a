"""OpenAI's /v1/responses, without stored state: a body to that of a chat completion, replies to responses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import FinishReason
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.replies import Delta, Reply
from dsmoe_local.protocol.values import json_object, missing
from dsmoe_local.protocol.writers import Event

_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_STATEFUL = ("previous_response_id", "conversation", "background", "prompt")
_IGNORED = frozenset({"include", "truncation", "max_tool_calls", "top_logprobs"})
_RENAMED = {"max_output_tokens": "max_tokens"}
_TURN = ("reasoning_content", "content", "tool_calls")
"""The parts of a message of the assistant, in their order."""


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the chat completion that a body of /v1/responses asks for. Raises RequestError."""
    for key in _STATEFUL:
        if body.get(key):
            raise RequestError(
                f"{key} is not supported: responses are not stored",
                remedy="send the whole conversation as input",
                param=key,
            )
    translated = {"input", "instructions", "text", "reasoning", "tools", *_STATEFUL, *_IGNORED}
    chat = {_RENAMED.get(key, key): value for key, value in body.items() if key not in translated}
    chat["messages"] = _messages(body)
    form = json_object("text.format", json_object("text", body.get("text")).get("format"))
    if form:
        # Here the parts of the schema are not wrapped once more.
        is_schema = form.get("type") == "json_schema"
        chat["response_format"] = {"type": "json_schema", "json_schema": form} if is_schema else form
    # Models differ in what they make of the other levels, which agents send with every request.
    if json_object("reasoning", body.get("reasoning")).get("effort") == "none":
        chat["reasoning_effort"] = "none"
    # Functions are not wrapped either.
    offered, choice = body.get("tools"), body.get("tool_choice")
    chat["tools"] = [*map(_wrapped, offered)] if isinstance(offered, list) else offered
    chat["tool_choice"] = _wrapped(choice)
    return chat


def _wrapped(value: object) -> object:
    """Return a function, or the choice of one, in the form of chat completions. Leave other values as they
    are.
    """
    if not isinstance(value, dict) or value.get("type") != "function":
        return value
    return {"type": "function", "function": {key: part for key, part in value.items() if key != "type"}}


def _messages(body: Mapping[str, Any]) -> list[object]:
    given = body.get("input")
    if given is None:
        raise missing("input", body)
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError("input is not text or a list of messages", param="input")
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    for item in given:
        if not isinstance(item, dict):
            raise RequestError("an item of input is not an object", param="input")
        message = _message(item)
        if not messages or not _continues(messages[-1], message):
            messages.append(message)
        elif "tool_calls" in message:
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages[-1] |= message
    return [{"content": "", **message} for message in messages]


def _continues(last: Mapping[str, Any], message: Mapping[str, Any]) -> bool:
    """Return whether a message is a later part of the same turn of the assistant as the one before it."""
    if not last["role"] == message["role"] == "assistant":
        return False
    part = next(index for index, key in enumerate(_TURN) if key in message)
    return "tool_calls" in message or not any(key in last for key in _TURN[part:])


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item as a message, or as a part of one of the assistant."""
    match item.get("type") or "message":
        case "message":
            return {"role": item.get("role"), "content": _content(item.get("content"))}
        case "reasoning":
            parts = item.get("content") or []
            texts = [str(part.get("text", "")) for part in parts if isinstance(part, dict)]
            return {"role": "assistant", "reasoning_content": "\n".join(texts)}
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            return {"role": "assistant", "tool_calls": [{"id": item.get("call_id"), "function": function}]}
        case "function_call_output":
            result = {"tool_call_id": item.get("call_id"), "content": _content(item.get("output"))}
            return {"role": "tool", **result}
        case kind:
            raise RequestError(
                f"input of the type {safe_line(str(kind), 40)!r} is not supported", param="input"
            )


def _content(content: object) -> object:
    """Return the content of a message in the form of chat completions."""
    if not isinstance(content, list):
        return content
    return [
        {"type": "text", "text": part.get("text")}
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS
        else part
        for part in content
    ]


class ResponseWriter:
    """Writes the reply to one request of /v1/responses. `name` is the unique part of its ids. Some fields of
    the `body` are part of the response.
    """

    done = b""

    def __init__(self, name: str, model: str, body: Mapping[str, Any]) -> None:
        self._name = name
        self._model = model
        self._echoed = {key: value if body.get(key) is None else body[key] for key, value in _ECHOED.items()}
        self._created = int(time.time())
        self._n_events = 0
        self._item: dict[str, Any] = {}  # the one that is being sent; empty if there is none
        self._pieces: list[str] = []
        self._items: list[dict[str, Any]] = []

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the response."""
        (choice,) = reply.choices
        self.events(Delta(0, choice.text, choice.reasoning, choice.calls, (), choice.finish_reason))
        return dict(self.end(reply)[-1][1]["response"])

    def events(self, delta: Delta) -> list[Event]:
        """Return the events of a delta: items of reasoning, messages and calls begin and end as needed."""
        found: list[Event] = []
        if not self._n_events:
            names = ("response.created", "response.in_progress")
            found += [self._event(name, response=self._response("in_progress", [], None)) for name in names]
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.text)):
            if text:
                if self._item.get("type") != kind:
                    found += [*self._end_item("completed"), *self._begin_item(kind)]
                found.append(self._grow(text))
        for call in delta.calls:
            if call.id:
                found += self._end_item("completed")
                found += self._begin_item("function_call", call_id=call.id, name=call.name)
            if call.arguments:
                found.append(self._grow(call.arguments))
        return found

    def end(self, reply: Reply) -> list[Event]:
        """Return the last events."""
        status = "completed" if reply.finish_reason is FinishReason.STOP else "incomplete"
        found = [] if self._item else self._begin_item("message")
        found += self._end_item(status)
        response = self._response(status, self._items, _usage(reply))
        return [*found, self._event(f"response.{status}", response=response)]

    def failure(self, error: Mapping[str, Any]) -> Event:
        """Return the event for an error object."""
        fields = {key: error["error"][key] for key in ("message", "code", "param")}
        return self._event("error", **fields)

    def _event(self, name: str, /, **values: Any) -> Event:  # noqa: ANN401 - JSON
        self._n_events += 1
        return name, {"type": name, "sequence_number": self._n_events - 1, **values}

    def _begin_item(self, kind: str, **values: Any) -> list[Event]:  # noqa: ANN401 - JSON
        index = len(self._items)
        item_id = f"{_KINDS[kind].prefix}_{self._name}_{index}"
        self._item = {"id": item_id, "type": kind, "status": "in_progress", **values}
        begun = self._filled("")
        added = begun if kind == "function_call" else {**begun, "content": []}
        found = [self._event("response.output_item.added", output_index=index, item=added)]
        if kind != "function_call":
            part = begun["content"][0]
            found.append(self._event("response.content_part.added", **self._place(), part=part))
        return found

    def _grow(self, text: str) -> Event:
        self._pieces.append(text)
        return self._event(f"{_KINDS[self._item['type']].event}.delta", **self._place(), delta=text)

    def _end_item(self, status: str) -> list[Event]:
        """End the current item, if there is one."""
        if not self._item:
            return []
        text = "".join(self._pieces)
        self._item["status"] = status
        item = self._filled(text)
        kind = _KINDS[item["type"]]
        if item["type"] == "function_call":
            found = [self._event(f"{kind.event}.done", **self._place(), arguments=text)]
        else:
            found = [
                self._event(f"{kind.event}.done", **self._place(), text=text),
                self._event("response.content_part.done", **self._place(), part=item["content"][0]),
            ]
        found.append(self._event("response.output_item.done", output_index=len(self._items), item=item))
        self._items.append(item)
        self._item, self._pieces = {}, []
        return found

    def _place(self) -> dict[str, Any]:
        place = {"item_id": self._item["id"], "output_index": len(self._items)}
        return {**place, **_KINDS[self._item["type"]].place}

    def _filled(self, text: str) -> dict[str, Any]:
        """Return the current item with its text."""
        if self._item["type"] == "function_call":
            return {**self._item, "arguments": text}
        if self._item["type"] == "reasoning":
            return {**self._item, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {**self._item, "role": "assistant", "content": [part]}

    def _response(
        self, status: str, output: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {
            "id": f"resp_{self._name}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **self._echoed,
            "usage": usage,
        }


class _Kind(NamedTuple):
    """How an item of one type is sent: the beginning of its id and of the names of its events, and what they
    contain.
    """

    prefix: str
    event: str
    place: Mapping[str, Any]


_KINDS = {
    "reasoning": _Kind("rs", "response.reasoning_text", {"content_index": 0}),
    "message": _Kind("msg", "response.output_text", {"content_index": 0, "logprobs": []}),
    "function_call": _Kind("fc", "response.function_call_arguments", {}),
}
_ECHOED: Mapping[str, Any] = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": None,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": None,
}
"""Fields of a request that a response repeats, with their defaults."""


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.n_prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.n_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": reply.n_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reply.n_reasoning_tokens},
        "total_tokens": reply.n_prompt_tokens + reply.n_completion_tokens,
    }
