"""How a model's chat template renders tools, and what is done if it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby
from typing import Any

from dsmoe_local.engine.reasoning import Vocabulary
from dsmoe_local.engine.tools.formats import HERMES, format_of
from dsmoe_local.engine.tools.parser import ToolParser
from dsmoe_local.engine.types import Message, Request, Tool, ToolCall

_INSTRUCTIONS = """\
You may call these functions to answer the user:
{tools}

To call a function, write its name and its arguments as a JSON object between two markers:
<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>
You may write several calls. Their results follow between <tool_response> and </tool_response>."""


class ToolSupport:
    """How a model writes tool calls.

    `form` is the format. `native` is true if the chat template renders tools.
    """

    def __init__(self, template: str, vocabulary: Vocabulary) -> None:
        form = format_of(template)
        self.native = form is not None
        self.form = form or HERMES
        self._vocabulary = vocabulary

    @cached_property
    def pieces(self) -> dict[int, bytes]:
        """The bytes of markers that are control tokens, by token id. Other control tokens have none."""
        pieces = {}
        for marker in self.form.texts:
            ids = self._vocabulary.tokenize(marker.encode(), special=True)
            if len(ids) == 1 and not self._vocabulary.piece(ids[0]):
                pieces[ids[0]] = marker.encode()
        return pieces

    def parser(self, request: Request) -> ToolParser:
        """Return a parser for a reply to a request with tools."""
        assert request.tools is not None
        return ToolParser(self.form, request.tools, bare=request.json_schema is None)

    def rendered(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
        """Return a conversation as the chat template can render it.

        If it cannot render tools, they become text: in the system's first message, in replies, and in the
        user's messages.
        """
        used = tools or any(message.tool_calls or message.tool_call_id for message in messages)
        if self.native or not used:
            return [*messages]
        return [*_as_text(messages, tools)]


def definition(tool: Tool) -> dict[str, Any]:
    """Return a tool as chat templates expect it: as in OpenAI's requests."""
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = json.loads(tool.parameters)
    return {"type": "function", "function": function}


def _as_text(messages: Sequence[Message], tools: Sequence[Tool]) -> Iterator[Message]:
    if tools:
        listed = "\n".join(json.dumps(definition(tool), ensure_ascii=False) for tool in tools)
        text = _INSTRUCTIONS.format(tools=listed)
        if messages[0].role == "system":
            text = f"{messages[0].content}\n\n{text}"
            messages = messages[1:]
        yield Message("system", text)
    for is_result, group in groupby(messages, lambda message: message.role == "tool"):
        if is_result:
            results = (f"<tool_response>\n{message.content}\n</tool_response>" for message in group)
            yield Message("user", "\n".join(results))
            continue
        for message in group:
            calls = map(_call_as_text, message.tool_calls)
            content = "\n".join(filter(None, (message.content, *calls)))
            yield replace(message, content=content, tool_calls=())


def _call_as_text(call: ToolCall) -> str:
    return f'<tool_call>\n{{"name": "{call.name}", "arguments": {call.arguments}}}\n</tool_call>'
