"""OpenAI's /v1/responses, without stored state: a body to that of a chat completion, replies to responses."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dsmoe_local.engine.types import FinishReason
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.replies import Delta, Reply
from dsmoe_local.protocol.tools import refuse_tools
from dsmoe_local.protocol.writers import Event

_TEXT_PARTS = frozenset({"input_text", "output_text", "text"})
_STATEFUL = ("previous_response_id", "conversation", "background", "prompt")
_IGNORED = frozenset({"include", "truncation", "max_tool_calls", "top_logprobs"})
_RENAMED = {"max_output_tokens": "max_tokens"}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the chat completion that a body of /v1/responses asks for. Raises RequestError."""
    for key in _STATEFUL:
        if body.get(key):
            raise RequestError(
                f"{key} is not supported: responses are not stored",
                remedy="send the whole conversation as input",
                param=key,
            )
    refuse_tools(body)
    translated = {"input", "instructions", "text", "reasoning", *_STATEFUL, *_IGNORED}
    chat = {_RENAMED.get(key, key): value for key, value in body.items() if key not in translated}
    chat["messages"] = _messages(body)
    form = _object("text.format", _object("text", body.get("text")).get("format"))
    if form:
        # Here the parts of the schema are not wrapped once more.
        is_schema = form.get("type") == "json_schema"
        chat["response_format"] = {"type": "json_schema", "json_schema": form} if is_schema else form
    reasoning = _object("reasoning", body.get("reasoning"))
    if reasoning.get("effort") is not None:
        chat["reasoning_effort"] = reasoning["effort"]
    return chat


def _object(key: str, value: object) -> dict[str, Any]:
    """Return a value that must be an object; an empty one for null."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"{key} is not an object", param=key)
    return value


def _messages(body: Mapping[str, Any]) -> list[object]:
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise RequestError("input is not text or a list of messages", param="input")
    messages = [message for item in given if (message := _message(item)) is not None]
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    return messages


def _message(item: object) -> object:
    """Return an item as a message; None for reasoning, which clients send back."""
    if not isinstance(item, dict):
        return item
    kind = item.get("type", "message")
    if kind == "reasoning":
        return None
    if kind != "message":
        raise RequestError(f"input of the type {str(kind)[:40]!r} is not supported", param="input")
    content = item.get("content")
    if isinstance(content, list):
        content = [
            {"type": "text", "text": part.get("text")}
            if isinstance(part, dict) and part.get("type") in _TEXT_PARTS
            else part
            for part in content
        ]
    return {"role": item.get("role"), "content": content}


class ResponseWriter:
    """Writes the reply to one request of /v1/responses. `name` is the unique part of its ids."""

    done = b""

    def __init__(self, name: str, model: str) -> None:
        self._name = name
        self._model = model
        self._created = int(time.time())
        self._n_events = 0
        self._open = ""  # the type of the item that is being sent
        self._texts: list[str] = []
        self._items: list[dict[str, Any]] = []

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the response."""
        (choice,) = reply.choices
        output: list[dict[str, Any]] = []
        if choice.reasoning:
            output.append(self._item("reasoning", choice.reasoning, len(output)))
        if choice.text or not output:
            output.append(self._item("message", choice.text, len(output)))
        return self._response(output, reply)

    def events(self, delta: Delta) -> list[Event]:
        """Return the events of a delta: items of reasoning and messages begin and end as needed."""
        found: list[Event] = []
        if not self._n_events:
            names = ("response.created", "response.in_progress")
            found += [self._event(name, response=self._response([], None)) for name in names]
        for kind, text in (("reasoning", delta.reasoning), ("message", delta.text)):
            if text:
                found += self._switch(kind)
                self._texts.append(text)
                found.append(self._event(f"{_PART_EVENTS[kind]}.delta", **self._place(), delta=text))
        return found

    def end(self, reply: Reply) -> list[Event]:
        """Return the last events."""
        found = self._switch("") if self._items or self._open else self._switch("message") + self._switch("")
        response = self._response(self._items, reply)
        return [*found, self._event(f"response.{response['status']}", response=response)]

    def failure(self, error: Mapping[str, Any]) -> Event:
        """Return the event for an error object."""
        fields = {key: error["error"][key] for key in ("message", "code", "param")}
        return self._event("error", **fields)

    def _event(self, name: str, **values: Any) -> Event:  # noqa: ANN401 - JSON
        self._n_events += 1
        return name, {"type": name, "sequence_number": self._n_events - 1, **values}

    def _place(self) -> dict[str, Any]:
        index = len(self._items)
        place = {"item_id": self._id(self._open, index), "output_index": index, "content_index": 0}
        return {**place, "logprobs": []} if self._open == "message" else place

    def _switch(self, kind: str) -> list[Event]:
        """End the current item if it has another type, and begin the next one, if `kind` is not empty."""
        if self._open == kind:
            return []
        found: list[Event] = []
        index = len(self._items)
        if self._open:
            text = "".join(self._texts)
            item = self._item(self._open, text, index)
            found.append(self._event(f"{_PART_EVENTS[self._open]}.done", **self._place(), text=text))
            found.append(self._event("response.content_part.done", **self._place(), part=item["content"][0]))
            found.append(self._event("response.output_item.done", output_index=index, item=item))
            self._items.append(item)
            self._texts = []
            index += 1
        self._open = kind
        if kind:
            item = self._item(kind, "", index)
            begun = {**item, "status": "in_progress", "content": []}
            found.append(self._event("response.output_item.added", output_index=index, item=begun))
            found.append(self._event("response.content_part.added", **self._place(), part=item["content"][0]))
        return found

    def _id(self, kind: str, index: int) -> str:
        return f"{'rs' if kind == 'reasoning' else 'msg'}_{self._name}_{index}"

    def _item(self, kind: str, text: str, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"id": self._id(kind, index), "type": kind, "status": "completed"}
        if kind == "reasoning":
            return {**item, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {**item, "role": "assistant", "content": [part]}

    def _response(self, output: list[dict[str, Any]], reply: Reply | None) -> dict[str, Any]:
        status, incomplete = "in_progress", None
        if reply is not None:
            finished = reply.choices[0].finish_reason is FinishReason.STOP
            status = "completed" if finished else "incomplete"
            incomplete = None if finished else {"reason": "max_output_tokens"}
        return {
            "id": f"resp_{self._name}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "model": self._model,
            "output": output,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "temperature": None,
            "tool_choice": "auto",
            "tools": [],
            "top_p": None,
            "usage": None if reply is None else _usage(reply),
        }


_PART_EVENTS = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def _usage(reply: Reply) -> dict[str, Any]:
    return {
        "input_tokens": reply.n_prompt_tokens,
        "input_tokens_details": {"cached_tokens": reply.n_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": reply.n_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reply.n_reasoning_tokens},
        "total_tokens": reply.n_prompt_tokens + reply.n_completion_tokens,
    }
