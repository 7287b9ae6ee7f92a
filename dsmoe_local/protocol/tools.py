"""Read the tools of a request and the calls in its messages, and write the calls of a reply."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from dsmoe_local.base.errors import UsageError
from dsmoe_local.base.text import safe_line
from dsmoe_local.engine.types import CallDelta, Tool, ToolCall, Tools
from dsmoe_local.protocol.errors import RequestError
from dsmoe_local.protocol.values import flag, text

_CHOICES = ("none", "auto", "required")


def offered_tools(body: Mapping[str, Any]) -> Tools | None:
    """Return the tools that a body offers; None if there are none or `tool_choice` is "none".

    Without tools, "auto" and "none" are valid choices, as in the requests of many clients.
    """
    offered, choice, parallel = (
        default if body.get(key) is None else body[key]
        for key, default in (("tools", []), ("tool_choice", "auto"), ("parallel_tool_calls", True))
    )
    if not isinstance(offered, list):
        raise RequestError("tools is not a list", param="tools")
    tools = tuple(_tool(index, item) for index, item in enumerate(offered))
    only = _named(choice)
    if only is None and choice not in _CHOICES:
        raise RequestError(
            f"tool_choice {safe_line(json.dumps(choice), 60)} is not supported",
            remedy='use "none", "auto", "required", or the name of a function',
            param="tool_choice",
        )
    if not isinstance(parallel, bool):
        raise RequestError("parallel_tool_calls is neither true nor false", param="parallel_tool_calls")
    if choice == "none" or (choice == "auto" and not tools):
        return None
    try:
        return Tools(tools, required=choice == "required", only=only, parallel=parallel)
    except UsageError as error:
        raise RequestError(error.what, remedy=error.remedy, param="tools") from error


def _named(choice: object) -> str | None:
    """Return the name of the function that a tool_choice selects."""
    match choice:
        case {"type": "function", "function": {"name": str(name)}}:
            return name
    return None


def _tool(index: int, value: object) -> Tool:
    where = f"tools[{index}]"
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind != "function":
        raise RequestError(
            f"{where}: the type {safe_line(str(kind), 40)!r} is not supported",
            remedy='use {"type": "function", "function": {...}}',
            param="tools",
        )
    function = value.get("function")
    if not isinstance(function, dict):
        raise RequestError(
            f"{where}.function is not an object",
            remedy='use {"type": "function", "function": {"name": ..., "parameters": ...}}',
            param="tools",
        )
    parameters = function.get("parameters")
    try:
        return Tool(
            text(f"{where}.function.name", function.get("name")),
            text(f"{where}.function.description", function.get("description") or ""),
            None if parameters is None else json.dumps(parameters),
            flag(f"{where}.function.strict", function.get("strict") or False),
        )
    except UsageError as error:
        raise RequestError(f"{where}: {error.what}", remedy=error.remedy, param="tools") from error


def calls_in_message(value: object) -> Iterator[ToolCall]:
    """Yield the tool calls of a message of the assistant. Arguments may be text or an object."""
    if not isinstance(value, list):
        raise RequestError("tool_calls is not a list")
    for item in value:
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(item, dict) or not isinstance(function, dict):
            raise RequestError('a tool call takes id and function: {"name": ..., "arguments": ...}')
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        try:
            yield ToolCall(
                text("the id of a tool call", item.get("id") or ""),
                text("the name of a tool call", function.get("name")),
                text("the arguments of a tool call", arguments),
            )
        except UsageError as error:
            raise RequestError(error.what, remedy=error.remedy) from error


def call_record(call: CallDelta) -> dict[str, Any]:
    """Return a complete call in the form of chat.completion."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def call_chunk(delta: CallDelta) -> dict[str, Any]:
    """Return a part of a call in the form of chat.completion.chunk. Only the first part has id and name."""
    if not delta.id:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **call_record(delta)}
