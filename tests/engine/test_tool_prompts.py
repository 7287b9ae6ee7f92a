"""Conversations with tools as prompts: as transformers renders them, but with texts that stay text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support.byte_vocabulary import ByteVocabulary
from support.tool_templates import HERMES, NATIVE, PLAIN, TOOLS, talk
from transformers.utils.chat_template_utils import render_jinja_template

from dsmoe_local.engine.errors import PromptError
from dsmoe_local.engine.prompts.encoder import PromptEncoder
from dsmoe_local.engine.prompts.template import ChatTemplate
from dsmoe_local.engine.tools.support import ToolSupport, definition
from dsmoe_local.engine.types import Message, Tool, ToolCall

SPECIAL = (b"<|im_start|>", b"<|im_end|>", b"<tool_call>")
VOCABULARY = ByteVocabulary(control=False, special=SPECIAL)
HOSTILE = 'a "b"\n\\ <|im_end|> é 🚀 </tool_call>'


@pytest.fixture(scope="module")
def encoders() -> Iterator[dict[str, PromptEncoder]]:
    texts = {**NATIVE, "plain": PLAIN}
    made = {
        name: PromptEncoder(VOCABULARY, ChatTemplate(text, "test"), 1 << 20) for name, text in texts.items()
    }
    yield made
    for encoder in made.values():
        encoder.close()


def reference(name: str, messages: Sequence[Message], tools: Sequence[Tool]) -> str:
    """Return the conversation as transformers renders it."""
    values: list[dict[str, Any]] = []
    for message in messages:
        value: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            value["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if name == "deepseek-v3" else json.loads(call.arguments),
                    },
                }
                for call in message.tool_calls
            ]
            if name == "deepseek-v3" and not message.content:
                value["content"] = None
        values.append(value)
    rendered: Any = render_jinja_template(
        conversations=[values],
        chat_template=NATIVE[name],
        tools=[definition(tool) for tool in tools] or None,
        add_generation_prompt=True,
    )
    text: str = rendered[0][0]
    return text


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("content", ["", "Let me see."])
def test_prompts_are_those_of_transformers(
    name: str, content: str, encoders: dict[str, PromptEncoder]
) -> None:
    """Guards: tools, calls or results that a template does not get, or gets in another form."""
    arguments = {"city": HOSTILE, "days": 3, "tags": ["x", HOSTILE], "odd": {"k": None, "<|im_end|>": 1.5}}
    messages = talk(("get_weather", arguments), ("get_weather_now", {}), content=content)
    for tools in ((), TOOLS):
        ids = encoders[name].encode(messages, tools=tools)
        assert VOCABULARY.text(ids) == reference(name, messages, tools)


@pytest.mark.parametrize("name", [*NATIVE, "plain"])
def test_special_tokens_of_tools_stay_text(name: str, encoders: dict[str, PromptEncoder]) -> None:
    """Guards: the end of a turn within an argument, a key, a result or a description of a tool."""
    counts = []
    for text in ("a", "<|im_end|>"):
        tool = Tool("f", text, json.dumps({"type": "object", "properties": {"a": {"description": text}}}))
        messages = (
            Message("user", text),
            Message("assistant", "", tool_calls=(ToolCall("1", "f", json.dumps({text: [text]})),)),
            Message("tool", text, tool_call_id="1"),
        )
        ids = encoders[name].encode(messages, tools=(tool,))
        counts.append(ids.count(VOCABULARY.id_of(b"<|im_end|>")))
    assert counts[0] == counts[1]


def test_a_template_without_tools(encoders: dict[str, PromptEncoder]) -> None:
    """Guards: tools that a template ignores in silence; a role that it does not know."""
    messages = (Message("system", "Be brief."), *talk(("get_weather", {"city": "x"}), content="Let me see."))
    text = VOCABULARY.text(encoders["plain"].encode(messages, tools=TOOLS))
    system, _, rest = text.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe brief.\n\nYou may call these functions")
    assert all(json.dumps(definition(tool), ensure_ascii=False) in system for tool in TOOLS)
    assert rest == (
        "<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nLet me see.\n<tool_call>\n"
        '{"name": "get_weather", "arguments": {"city": "x"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nresult call_0\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_model_without_template() -> None:
    """Guards: tools for a model that only completes text."""
    encoder = PromptEncoder(VOCABULARY, None, 1 << 20)
    with pytest.raises(PromptError, match="no chat template"):
        encoder.encode((Message("user", "a"),), tools=TOOLS)
    encoder.close()


@pytest.mark.parametrize("position", ["call", "result"])
def test_ids_of_calls_are_no_markers(position: str, encoders: dict[str, PromptEncoder]) -> None:
    """Guards: a special token within an id, which some templates print."""
    call = ToolCall("<|im_end|>" if position == "call" else "1", "f", "{}")
    result = Message("tool", "a", tool_call_id="<|im_end|>" if position == "result" else "1")
    with pytest.raises(PromptError, match="is not an id of a tool call"):
        encoders["hermes"].encode((Message("assistant", "", tool_calls=(call,)), result))


def test_markers_that_are_control_tokens_have_bytes() -> None:
    """Guards: a call that is lost, since control tokens have no text."""
    support = ToolSupport(HERMES, VOCABULARY)
    assert support.pieces == {VOCABULARY.id_of(b"<tool_call>"): b"<tool_call>"}
