"""Anthropic's messages: a body to that of a chat completion, and replies to messages and their events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import CallDelta, FinishReason
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.replies import Choice, Delta, Reply
from dsmoe_local.protocol.values import json_object, missing
from dsmoe_local.protocol.writers import Event

_REFUSED = {
    # Anthropic's client looks for this kind, and then sends the whole conversation.
    "thread": (
        "nothing is stored between requests",
        "send the whole conversation as messages",
        "thread_unsupported_request",
    ),
    "container": (
        "the server runs no code",
        "leave it out, and run tools in your program",
        "invalid_request",
    ),
    "mcp_servers": (
        "the server connects to no other servers",
        "connect to them in your program, and describe their tools in tools",
        "invalid_request",
    ),
}
"""Fields that are refused: why, what to do, and the kind of the error."""
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of the chat completion that a body of /v1/messages asks for. Raises RequestError.

    As in Anthropic's API, a last message of the assistant is continued.
    """
    for key, (reason, remedy, kind) in _REFUSED.items():
        if body.get(key):
            raise RequestError(f"{key} is not supported: {reason}", remedy=remedy, kind=kind, param=key)
    if not isinstance(body.get("max_tokens"), int):
        raise RequestError("max_tokens is missing", remedy="set it to a number of tokens", param="max_tokens")
    messages = body.get("messages")
    if messages is None:
        raise missing("messages", body)
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages is not a list of messages", param="messages")
    translated = {"system", "messages", "stop_sequences", "thinking", "tools", "tool_choice", "output_config"}
    chat = {key: value for key, value in body.items() if key not in translated}
    turns = [turn for message in messages for turn in _turns(message)]
    if body.get("system"):
        turns.insert(0, {"role": "system", "content": body["system"]})
    tools = _tools(body)
    if isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        if tools.get("tools") and tools.get("tool_choice") != "none":
            raise RequestError(
                "with tools, the last message cannot be the assistant's",
                remedy="end messages with a user turn, or leave out tools",
                param="messages",
            )
        chat["continue_final_message"] = True
    chat["messages"] = turns
    if "stop_sequences" in body:
        chat["stop"] = body["stop_sequences"]
    if body.get("thinking") is not None:
        chat["reasoning_budget"] = _reasoning_budget(body["thinking"])
    return chat | tools | _output_format(body.get("output_config"))


def _turns(message: object) -> Iterator[object]:
    """Yield a message in OpenAI's form, after those with the results of calls that it contains.

    Whatever is not known is left as it is, to be refused by name.
    """
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        yield message
        return
    blocks = message["content"]
    others = []
    for block in blocks:
        if isinstance(block, dict) and block.get("type") == "tool_result":
            result = {"tool_call_id": block.get("tool_use_id"), "content": block.get("content") or ""}
            yield {"role": "tool", **result}
        else:
            others.append(block)
    if others or not blocks:
        yield _turn(message, others)


def _turn(message: Mapping[str, Any], blocks: list[Any]) -> dict[str, Any]:
    """Return a message of these blocks: text, calls and reasoning each have a key of their own."""
    texts, calls, reasoning = [], [], ""
    for block in blocks:
        match block:
            case {"type": "tool_use"}:
                function = {"name": block.get("name"), "arguments": block.get("input")}
                calls.append({"id": block.get("id"), "function": function})
            case {"type": "thinking"}:
                reasoning += str(block.get("thinking", ""))
            case {"type": "redacted_thinking"}:
                pass
            case _:
                texts.append(block)
    parts = {"tool_calls": calls, "reasoning_content": reasoning}
    return {**message, "content": texts, **{key: part for key, part in parts.items() if part}}


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tools of a body and the choice among them in OpenAI's form."""
    found: dict[str, Any] = {}
    if isinstance(offered := body.get("tools"), list):
        found["tools"] = [_tool(index, tool) for index, tool in enumerate(offered)]
    elif offered is not None:
        found["tools"] = offered
    choice = body.get("tool_choice")
    if choice is None:
        return found
    match choice:
        case {"type": "tool", "name": name}:
            found["tool_choice"] = {"type": "function", "function": {"name": name}}
        case {"type": "auto" | "any" | "none" as kind}:
            found["tool_choice"] = _TOOL_CHOICES[kind]
        case _:
            raise RequestError(
                f"tool_choice {safe_line(json.dumps(choice), 60)} is not supported",
                remedy='its type is "auto", "any", "none", or "tool" with the name of a tool',
                param="tool_choice",
            )
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _tool(index: int, tool: object) -> object:
    if not isinstance(tool, dict):
        return tool
    if tool.get("type") not in (None, "custom"):
        raise RequestError(
            f"tools[{index}]: the type {safe_line(str(tool['type']), 40)!r} is not supported",
            remedy="describe a tool of your program: name, description and input_schema",
            param="tools",
        )
    function = {key: tool[key] for key in ("name", "description", "strict") if key in tool}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema")}}


def _output_format(config: object) -> dict[str, Any]:
    """Return the schema that `output_config` has for the answer, in OpenAI's form."""
    match json_object("output_config", config).get("format"):
        case None:
            return {}
        case {"type": "json_schema", "schema": schema}:
            return {"json_schema": schema}
    raise RequestError(
        "output_config.format is not supported",
        remedy='it takes {"type": "json_schema", "schema": {...}}',
        param="output_config",
    )


def _reasoning_budget(thinking: object) -> object:
    """Return the number of tokens for reasoning; None for no limit."""
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind == "disabled":
        return 0
    if isinstance(thinking, dict) and kind == "enabled":
        return thinking.get("budget_tokens")
    if kind == "adaptive":
        return None
    raise RequestError("thinking.type is not enabled, adaptive or disabled", param="thinking")


class MessageWriter:
    """Writes the reply to one request of /v1/messages. `name` is the unique part of its id."""

    done = b""

    def __init__(self, name: str, model: str) -> None:
        self._message: dict[str, Any] = {
            "id": f"msg_{name}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._n_blocks = 0
        self._open = ""  # the type of the block that is being sent
        self._begun = False

    def whole(self, reply: Reply) -> dict[str, Any]:
        """Return the message."""
        (choice,) = reply.choices
        content = _content(choice)
        calls = any(block["type"] == "tool_use" for block in content)
        ending = _ending(choice, calls=calls)
        return {**self._message, "content": content, **ending, "usage": _usage(reply)}

    def events(self, delta: Delta) -> list[Event]:
        """Return the events of a delta: blocks of thinking, text and calls begin and end as needed."""
        found: list[Event] = []
        if not self._begun:
            self._begun = True
            # The number of prompt tokens is not known yet; the last event has it.
            usage = {"input_tokens": 0, "output_tokens": 0}
            found.append(("message_start", {"message": {**self._message, "usage": usage}}))
        for block, text in ((_thinking(""), delta.reasoning), (_text(""), delta.text)):
            if text:
                kind = block["type"]
                if self._open != kind:
                    found += [*self._end_block(), self._begin_block(block)]
                found.append(self._part({"type": f"{kind}_delta", kind: text}))
        for call in delta.calls:
            if call.id:
                found += [*self._end_block(), self._begin_block(_tool_use(call, {}))]
            if call.arguments:
                found.append(self._part({"type": "input_json_delta", "partial_json": call.arguments}))
        return [(name, {"type": name, **value}) for name, value in found]

    def end(self, reply: Reply) -> list[Event]:
        """Return the last events."""
        (choice,) = reply.choices
        found = self._end_block()
        ending = _ending(choice, calls=bool(choice.calls))
        found.append(("message_delta", {"delta": ending, "usage": _usage(reply)}))
        found.append(("message_stop", {}))
        return [(name, {"type": name, **value}) for name, value in found]

    def failure(self, error: Mapping[str, Any]) -> Event:
        """Return the event for an error object."""
        return "error", error

    def _begin_block(self, block: dict[str, Any]) -> Event:
        self._open = block["type"]
        self._n_blocks += 1
        return "content_block_start", {"index": self._n_blocks - 1, "content_block": block}

    def _part(self, delta: dict[str, Any]) -> Event:
        return "content_block_delta", {"index": self._n_blocks - 1, "delta": delta}

    def _end_block(self) -> list[Event]:
        if not self._open:
            return []
        self._open = ""
        return [("content_block_stop", {"index": self._n_blocks - 1})]


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, "signature": ""}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _tool_use(call: CallDelta, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _content(choice: Choice) -> list[dict[str, Any]]:
    """Return the blocks of a reply. A call is left out if a limit has cut its arguments. If the model has
    written arguments that are not a JSON object, the call is text.
    """
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        blocks.append(_thinking(choice.reasoning))
    if choice.text:
        blocks.append(_text(choice.text))
    for call in choice.calls:
        try:
            arguments = json.loads(call.arguments)
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            blocks.append(_tool_use(call, arguments))
        elif choice.finish_reason is FinishReason.STOP:
            blocks.append(_text(f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}'))
    return blocks or [_text("")]


def _ending(choice: Choice, *, calls: bool) -> dict[str, str | None]:
    """Return why a reply ended. `calls`: it was sent with blocks of calls."""
    reason = {
        FinishReason.LENGTH: "max_tokens",
        FinishReason.CONTEXT_FULL: "model_context_window_exceeded",
    }.get(choice.finish_reason)
    if reason is None:
        reason = "stop_sequence" if choice.stop else "tool_use" if calls else "end_turn"
    return {"stop_reason": reason, "stop_sequence": choice.stop or None}


def _usage(reply: Reply) -> dict[str, int]:
    # Anthropic counts cached tokens apart.
    return {
        "input_tokens": reply.n_prompt_tokens - reply.n_cached_tokens,
        "cache_read_input_tokens": reply.n_cached_tokens,
        "output_tokens": reply.n_completion_tokens,
    }
