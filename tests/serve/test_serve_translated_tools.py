"""Tool calls in /v1/messages and /v1/responses: the clients of Anthropic and OpenAI as oracles."""

from __future__ import annotations

import json
import threading
from typing import Any

import anthropic
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel
from support.fake_engine import FakeEngine
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.types import CallDelta, FinishReason, Message, Tool, ToolCall, Tools, Usage
from dsmoe_local.protocol.anthropic import MessageWriter
from dsmoe_local.protocol.replies import Choice, Reply


class Weather(BaseModel):
    """Return the weather."""

    city: str


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Par\\u00eds"}}\n</tool_call>'
TWO_CALLS = f"Let me see.\n{CALL}\n{CALL}"
CLAUDE: Any = {"name": "weather", "description": "Return the weather.", "input_schema": SCHEMA}
FUNCTION: Any = {
    "type": "function",
    "name": "weather",
    "description": "Return the weather.",
    "parameters": SCHEMA,
    "strict": True,
}


def claude(server: Serving) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0)


def openai_client(server: Serving) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def without_ids(message: anthropic.types.Message) -> list[dict[str, Any]]:
    return [block.model_dump(exclude={"id", "parsed_output"}) for block in message.content]


@pytest.mark.parametrize(
    ("reply", "reasons"), [(TWO_CALLS, False), (CALL, False), (f"<think>hm</think>{CALL}", True)]
)
def test_calls_in_messages(reply: str, reasons: bool) -> None:
    """Guards: calls that Anthropic's client cannot put together; another result streamed than as a whole."""
    engine = FakeEngine(replies=[reply], reasons=reasons)
    asked: Any = {"model": "fake", "max_tokens": 500, "messages": HELLO, "tools": [CLAUDE]}
    with serving(engine) as server, claude(server) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            events = list(stream)
            streamed = stream.get_final_message()
    assert without_ids(streamed) == without_ids(whole)
    assert (streamed.stop_reason, whole.stop_reason) == ("tool_use", "tool_use")
    calls = [block for block in whole.content if block.type == "tool_use"]
    assert [(call.name, call.input) for call in calls] == [("weather", {"city": "París"})] * reply.count(CALL)
    assert len({call.id for call in calls}) == len(calls)
    opened = [event.index for event in events if event.type == "content_block_start"]
    closed = [event.index for event in events if event.type == "content_block_stop"]
    assert opened == closed == list(range(len(whole.content)))


def test_anthropics_tool_runner() -> None:
    """Guards: a conversation that lost its beginning, since the client believed that the server stores it."""
    engine = FakeEngine(replies=[TWO_CALLS, "Sunny."])

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Return the weather.

        Args:
            city: Where.
        """
        return f"sunny in {city}"

    asked: Any = {"model": "fake", "max_tokens": 500, "messages": HELLO}
    with serving(engine) as server, claude(server) as client:
        last = client.beta.messages.tool_runner(tools=[weather], **asked).until_done()
    assert [block.text for block in last.content if block.type == "text"] == ["Sunny."]
    prompt = engine.requests[1].prompt
    assert not isinstance(prompt, str)
    first, reply, *results = prompt
    assert isinstance(reply, Message)
    assert (first, reply.role, reply.content) == (Message("user", "hi"), "assistant", "Let me see.")
    assert [(call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [
        ("weather", {"city": "París"})
    ] * 2
    ids = [call.id for call in reply.tool_calls]
    assert results == [Message("tool", "sunny in París", tool_call_id=name) for name in ids]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {}),
        ({"type": "auto", "disable_parallel_tool_use": True}, {"parallel": False}),
        ({"type": "any"}, {"required": True}),
        ({"type": "tool", "name": "weather"}, {"only": "weather"}),
        ({"type": "none"}, None),
    ],
)
def test_choices_in_messages(choice: Any, expected: dict[str, Any] | None) -> None:
    """Guards: a choice that is translated to another one."""
    engine = FakeEngine()
    with serving(engine) as server, claude(server) as client:
        asked: Any = {"model": "fake", "max_tokens": 500, "messages": HELLO}
        client.messages.create(tools=[CLAUDE], tool_choice=choice, **asked)
    tool = Tool("weather", "Return the weather.", json.dumps(SCHEMA))
    assert engine.requests[0].tools == (None if expected is None else Tools((tool,), **expected))


def test_what_messages_with_results_become() -> None:
    """Guards: text beside a result that gets lost, or comes before it; lost reasoning."""
    engine = FakeEngine()
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}}
    thinking = {"type": "thinking", "thinking": "hm", "signature": ""}
    note = {"type": "text", "text": "one failed"}
    messages: Any = [
        *HELLO,
        {"role": "assistant", "content": [thinking, use, {**use, "id": "t2"}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sunny"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [note], "is_error": True},
                {"type": "text", "text": "go on"},
            ],
        },
    ]
    with serving(engine) as server, claude(server) as client:
        client.messages.create(model="fake", max_tokens=5, messages=messages, tools=[CLAUDE])
    calls = tuple(ToolCall(name, "weather", '{"city": "Rome"}') for name in ("t1", "t2"))
    assert engine.requests[0].prompt == (
        Message("user", "hi"),
        Message("assistant", "", reasoning_content="hm", tool_calls=calls),
        Message("tool", "sunny", tool_call_id="t1"),
        Message("tool", "one failed", tool_call_id="t2"),
        Message("user", "go on"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [{**CLAUDE, "name": "two words"}]}, "not a name of a tool"),
        ({"tools": [{**CLAUDE, "input_schema": "city"}]}, "not a JSON schema"),
        ({"tools": [CLAUDE], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [CLAUDE], "tool_choice": {"type": "tool", "name": "other"}}, "no tool 'other'"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"extra_body": {"mcp_servers": [{"url": "x"}]}}, "describe their tools in tools"),
        ({"extra_body": {"container": "c"}}, "run tools in your program"),
        (
            {"tools": [CLAUDE], "messages": [*HELLO, {"role": "assistant", "content": "I"}]},
            "end messages with a user turn, or leave out tools",
        ),
        ({"output_config": {"format": {"type": "regex"}}}, "output_config.format"),
    ],
)
def test_refused_tools_in_messages(change: dict[str, Any], message: str) -> None:
    """Guards: a tool that the model is not told of, though the client expects its calls."""
    asked: Any = {"model": "fake", "max_tokens": 5, "messages": HELLO, **change}
    with (
        serving(FakeEngine()) as server,
        claude(server) as client,
        pytest.raises(anthropic.BadRequestError, match=message),
    ):
        client.messages.create(**asked)


@pytest.mark.parametrize("api", ["messages", "responses"])
def test_arguments_arrive_while_they_are_written(api: str) -> None:
    """Guards: a client that waits for the end of a call before it sees the first of its arguments."""
    seen = threading.Event()

    def gate(index: int) -> None:
        assert index < CALL.index("Par") or seen.wait(60)

    with serving(FakeEngine(replies=[CALL], gate=gate)) as server:
        if api == "messages":
            asked: Any = {"model": "fake", "max_tokens": 500, "messages": HELLO, "tools": [CLAUDE]}
            with claude(server) as client, client.messages.stream(**asked) as messages:
                for event in messages:
                    if event.type == "input_json":
                        seen.set()
        else:
            asked = {"model": "fake", "input": "hi", "tools": [FUNCTION]}
            with openai_client(server) as other, other.responses.stream(**asked) as responses:
                for each in responses:
                    if each.type == "response.function_call_arguments.delta":
                        seen.set()
    assert seen.is_set()


@pytest.mark.parametrize("limit", [20, 60])
def test_a_call_that_is_cut(limit: int) -> None:
    """Guards: a call without its arguments that looks complete."""
    engine = FakeEngine(replies=[CALL])
    with serving(engine) as server, claude(server) as client, openai_client(server) as other:
        message = client.messages.create(model="fake", max_tokens=limit, messages=HELLO, tools=[CLAUDE])  # type: ignore[arg-type]
        response = other.responses.create(model="fake", input="hi", tools=[FUNCTION], max_output_tokens=limit)
    assert message.stop_reason == "max_tokens"
    assert [block.type for block in message.content] == ["text"]
    assert response.status == "incomplete"
    assert [getattr(item, "status", "") for item in response.output] == ["incomplete"]


@pytest.mark.parametrize("arguments", ["[1, 2]", '"Rome"'])
def test_arguments_that_are_not_an_object(arguments: str) -> None:
    """Guards: a message that ends with a call, but has none; a client that is sent another type of input."""
    call = CallDelta(0, arguments, "call_1", "weather")
    choice = Choice("", FinishReason.STOP, calls=(call,))
    reply = Reply("id", "fake", True, (choice,), (Usage(1, 0, 1, 0.0, 0.0, None),), 0.0)
    message = anthropic.types.Message(**MessageWriter("name", "fake").whole(reply))
    assert message.stop_reason == "end_turn"
    (block,) = message.content
    assert block.type == "text"
    assert json.loads(block.text) == {"name": "weather", "arguments": json.loads(arguments)}


def test_a_prefill_with_tools_that_cannot_be_called() -> None:
    """Guards: a last message of the assistant that is refused, although no call is possible."""
    engine = FakeEngine()
    messages: Any = [*HELLO, {"role": "assistant", "content": "I"}]
    with serving(engine) as server, claude(server) as client:
        client.messages.create(
            model="fake", max_tokens=5, messages=messages, tools=[CLAUDE], tool_choice={"type": "none"}
        )
    assert engine.requests[0].continue_final_message


def test_stop_sequences() -> None:
    """Guards: a reply that ended at a stop sequence and looks as if the model had ended it."""
    engine = FakeEngine(replies=["abcdef"])
    asked: Any = {"model": "fake", "max_tokens": 50, "messages": HELLO, "stop_sequences": ["ef", "cd"]}
    with serving(engine) as server, claude(server) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert without_ids(message)[0]["text"] == "ab"
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "cd")


def test_counted_tokens() -> None:
    """Guards: a number that differs from what the same message then uses; a request that needs max_tokens."""
    engine = FakeEngine()
    asked: Any = {"model": "fake", "messages": HELLO, "system": "be brief", "tools": [CLAUDE]}
    with serving(engine) as server, claude(server) as client:
        counted = client.messages.count_tokens(**asked)
        used = client.messages.create(max_tokens=5, **asked).usage
        assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)
        with pytest.raises(anthropic.BadRequestError, match="messages is not a list"):
            client.messages.count_tokens(model="fake", messages=[])
    assert len(engine.requests) == 1


def test_a_schema_for_messages() -> None:
    """Guards: the schema of Anthropic's `parse` that gets lost."""
    engine = FakeEngine(replies=['{"city": "Rome"}'])
    asked: Any = {"model": "fake", "max_tokens": 50, "messages": HELLO}
    with serving(engine) as server, claude(server) as client:
        parsed = client.messages.parse(output_format=Weather, **asked)
    assert parsed.parsed_output == Weather(city="Rome")
    assert engine.requests[0].json_schema is not None


@pytest.mark.parametrize(
    ("reply", "reasons"), [(TWO_CALLS, False), (CALL, False), (f"<think>hm</think>{CALL}", True)]
)
def test_calls_in_responses(reply: str, reasons: bool) -> None:
    """Guards: events that OpenAI's client cannot put together; another result streamed than as a whole."""
    engine = FakeEngine(replies=[reply.replace("weather", "Weather")], reasons=reasons)
    tool: Any = pydantic_function_tool(Weather)
    asked: Any = {"model": "fake", "input": "hi", "tools": [tool]}
    with serving(engine) as server, openai_client(server) as client:
        whole = client.responses.parse(**asked)
        with client.responses.stream(**asked) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    varying = {"id", "call_id", "parsed"}
    assert [item.model_dump(exclude=varying) for item in streamed.output] == [
        item.model_dump(exclude=varying) for item in whole.output
    ]
    assert whole.status == streamed.status == "completed"
    calls = [item for item in whole.output if item.type == "function_call"]
    assert [call.parsed_arguments for call in calls] == [Weather(city="París")] * reply.count(CALL)
    assert len({call.call_id for call in calls}) == len(calls)
    assert whole.tools[0].model_dump()["name"] == "Weather"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    for item in (item for item in streamed.output if item.type == "function_call"):
        parts = [
            event.delta
            for event in events
            if event.type == "response.function_call_arguments.delta" and event.item_id == item.id
        ]
        assert "".join(parts) == item.arguments
        assert item.arguments in [event.arguments for event in done]


def test_the_conversation_of_responses_goes_on() -> None:
    """Guards: OpenAI's own items refused when they are sent back; calls apart from the text before them."""
    engine = FakeEngine(replies=[f"<think>hm</think>{TWO_CALLS}", "Sunny."], reasons=True)
    history: list[Any] = [{"role": "user", "content": "hi"}]
    with serving(engine) as server, openai_client(server) as client:
        first = client.responses.create(model="fake", input=history, tools=[FUNCTION])
        history += first.output
        calls = [item for item in first.output if item.type == "function_call"]
        history += [
            {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"},
            {
                "type": "function_call_output",
                "call_id": calls[1].call_id,
                "output": [{"type": "input_text", "text": "windy"}],
            },
        ]
        choice: Any = {"type": "function", "name": "weather"}
        client.responses.create(
            model="fake", input=history, tools=[FUNCTION], tool_choice=choice, parallel_tool_calls=False
        )
    request = engine.requests[1]
    made = tuple(ToolCall(call.call_id, call.name, call.arguments) for call in calls)
    assert request.prompt == (
        Message("user", "hi"),
        Message("assistant", "Let me see.", reasoning_content="hm", tool_calls=made),
        Message("tool", "sunny", tool_call_id=made[0].id),
        Message("tool", "windy", tool_call_id=made[1].id),
    )
    tool = Tool("weather", "Return the weather.", json.dumps(SCHEMA), strict=True)
    assert request.tools == Tools((tool,), only="weather", parallel=False)


def test_reasoning_that_nothing_follows() -> None:
    """Guards: the reply that a limit cut during its reasoning, refused when it is sent back."""
    engine = FakeEngine(replies=["<think>hm</think>yes"], reasons=True)
    with serving(engine) as server, openai_client(server) as client:
        cut = client.responses.create(model="fake", input="hi", max_output_tokens=9)
        assert [item.type for item in cut.output] == ["reasoning"]
        history: Any = [{"role": "user", "content": "hi"}, *cut.output, {"role": "user", "content": "go on"}]
        client.responses.create(model="fake", input=history)
    roles = [message.role for message in engine.requests[1].prompt if isinstance(message, Message)]
    assert roles == ["user", "assistant", "user"]
