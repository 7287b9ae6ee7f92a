"""Tool calls in batches: OpenAI's lines in, records that the openai package's own types accept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openai import pydantic_function_tool
from openai.types.chat import ChatCompletion, ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel
from support.batches import answer, batch, by_id
from support.fake_engine import FakeEngine

from dsmoe_local.engine.types import Message, Tool, ToolCall, Tools


class Weather(BaseModel):
    """Return the weather."""

    city: str


TOOL = pydantic_function_tool(Weather)
CALL = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def line(name: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": messages, "tools": [TOOL], **body},
    }


def test_replies_with_calls(tmp_path: Path) -> None:
    """Guards: calls that OpenAI's own types refuse, or that end with another finish reason."""
    lines = [line("one"), line("cut", max_tokens=60)]
    engine = FakeEngine(replies=[f"Let me see.\n{CALL}\n{CALL}", CALL], n_parallel=1)
    found = by_id(answer(engine, batch(tmp_path, *lines, form="openai", ordered=True)))
    replies = {
        name: ChatCompletion.model_validate(record["response"]["body"], strict=True)
        for name, record in found.items()
    }
    (choice,) = replies["one"].choices
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    calls = choice.message.tool_calls or []
    assert len({call.id for call in calls}) == 2
    for call in calls:
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert call.function.name == "Weather"
        assert Weather.model_validate_json(call.function.arguments) == Weather(city="Paris")
    (choice,) = replies["cut"].choices
    assert (choice.message.content, choice.finish_reason) == (None, "length")


def test_the_conversation_goes_on(tmp_path: Path) -> None:
    """Guards: OpenAI's own dump of a reply refused as a message; results that are not linked to calls."""
    first = answer(FakeEngine(replies=[CALL]), batch(tmp_path, line("a"), form="openai"))
    reply = ChatCompletion.model_validate(first[0]["response"]["body"]).choices[0].message
    (call,) = reply.tool_calls or []
    messages = [
        {"role": "user", "content": "hi"},
        reply.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    choice = {"type": "function", "function": {"name": "Weather"}}
    engine = FakeEngine()
    (tmp_path / "second").mkdir()
    lines = [line("b", messages=messages, tool_choice=choice, parallel_tool_calls=False)]
    answer(engine, batch(tmp_path / "second", *lines))
    (request,) = engine.requests
    assert request.prompt == (
        Message("user", "hi"),
        Message("assistant", "", tool_calls=(ToolCall(call.id, "Weather", '{"city": "Paris"}'),)),
        Message("tool", "sunny", tool_call_id=call.id),
    )
    function = TOOL["function"]
    schema = json.dumps(function["parameters"])
    offered = Tool("Weather", "Return the weather.", schema, strict=True)
    assert request.tools == Tools((offered,), only="Weather", parallel=False)


def test_simple_records(tmp_path: Path) -> None:
    """Guards: calls that `--format simple` leaves out; a `tool_choice` of "none" that is not honoured."""
    engine = FakeEngine(replies=[CALL])
    lines = [line("a"), line("b", tool_choice="none"), line("c", n=2)]
    one, none, two = answer(engine, batch(tmp_path, *lines, ordered=True))
    assert (one["text"], one["finish_reason"]) == ("", "stop")
    assert [call["function"]["name"] for call in one["tool_calls"]] == ["Weather"]
    assert none["text"] == CALL
    assert "tool_calls" not in none
    assert [len(calls) for calls in two["tool_calls"]] == [1, 1]
