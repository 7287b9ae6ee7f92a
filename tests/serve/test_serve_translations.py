"""/v1/messages and /v1/responses: the clients of Anthropic and OpenAI as oracles."""

from __future__ import annotations

from typing import Any

import anthropic
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel
from support.fake_engine import FakeEngine
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.errors import NativeError
from dsmoe_local.engine.types import Message

REASONING = "<think>let me see</think>Yes"


def claude(server: Serving) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0)


def openai_client(server: Serving) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


@pytest.mark.parametrize("reasons", [False, True])
def test_messages(reasons: bool) -> None:
    """Guards: blocks that Anthropic's client cannot put together; another result streamed than as a whole."""
    engine = FakeEngine(replies=[REASONING if reasons else "Yes"], reasons=reasons)
    asked: Any = {"model": "fake", "max_tokens": 50, "messages": HELLO, "system": "be brief"}
    with serving(engine) as server, claude(server) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            text = "".join(stream.text_stream)
            streamed = stream.get_final_message()
    kinds = [block.type for block in whole.content]
    assert kinds == (["thinking", "text"] if reasons else ["text"])
    assert [block.model_dump() for block in streamed.content] == [
        block.model_dump() for block in whole.content
    ]
    assert whole.content[-1].text == text == "Yes"
    assert (whole.stop_reason, streamed.stop_reason) == ("end_turn", "end_turn")
    n_prompt = whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert streamed.usage.input_tokens + (streamed.usage.cache_read_input_tokens or 0) == n_prompt > 0
    assert streamed.usage.output_tokens == whole.usage.output_tokens > 0
    assert engine.requests[0].prompt == (Message("system", "be brief"), Message("user", "hi"))


def test_what_messages_are_translated_to() -> None:
    """Guards: a field that gets lost; a message of the assistant that is not continued."""
    engine = FakeEngine(replies=["x"])
    blocks: Any = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "b"},
            ],
        },
    ]
    with serving(engine) as server, claude(server) as client:
        client.messages.create(
            model="fake",
            max_tokens=7,
            messages=blocks,
            stop_sequences=["END"],
            extra_body={"temperature": 0.5},
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
    (request,) = engine.requests
    assert request.prompt == (Message("user", "a"), Message("assistant", "b", reasoning_content="hm"))
    assert request.continue_final_message
    assert (request.max_tokens, request.stop, request.reasoning_budget) == (7, ("END",), 1024)
    assert request.sampling.temperature == 0.5


def test_errors_in_anthropics_form() -> None:
    """Guards: errors that Anthropic's client shows without their message."""
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {}}]}]
    with serving(FakeEngine()) as server, claude(server) as client:
        with pytest.raises(anthropic.BadRequestError, match="'image' is not supported"):
            client.messages.create(model="fake", max_tokens=5, messages=image)
        with pytest.raises(anthropic.NotFoundError, match="no model 'claude'"):
            client.messages.create(model="claude", max_tokens=5, messages=HELLO)  # type: ignore[arg-type]
    assert server.log

    def gate(index: int) -> None:
        if index == 2:
            raise NativeError("llama.cpp failed")

    asked: Any = {"model": "fake", "max_tokens": 5, "messages": HELLO}
    with (
        serving(FakeEngine(gate=gate)) as server,
        claude(server) as client,
        client.messages.stream(**asked) as stream,
        pytest.raises(anthropic.APIStatusError, match=r"llama\.cpp failed"),
    ):
        stream.get_final_message()


@pytest.mark.parametrize(
    ("options", "headers", "body", "status", "kind"),
    [
        ({"api_key": "k"}, {}, {}, 401, "authentication_error"),
        ({}, {"host": "evil.example"}, {}, 403, "permission_error"),
        ({}, {}, {"thread": "t"}, 400, "invalid_request_error"),
        ({}, {}, {"model": "claude"}, 404, "not_found_error"),
        ({"max_body": 10}, {}, {}, 413, "request_too_large"),
        ({}, {}, {}, 503, "overloaded_error"),
    ],
)
def test_types_of_errors(
    options: dict[str, Any], headers: dict[str, str], body: dict[str, Any], status: int, kind: str
) -> None:
    """Guards: errors of /v1/messages in OpenAI's form, above all those before the body is read."""

    def gate(index: int) -> None:
        raise NativeError("llama.cpp failed")

    asked = {"max_tokens": 5, "messages": HELLO, **body}
    with serving(FakeEngine(gate=gate), **options) as server:
        answer = server.send("/v1/messages", asked, **headers)
    assert answer.status == status
    error = answer.json
    assert (error["type"], error["error"]["type"]) == ("error", kind)
    assert ("details" in error["error"]) == (status == 400)
    if status == 400:
        assert error["error"]["details"] == {"error_code": "thread_unsupported_request"}


@pytest.mark.parametrize(
    ("effort", "budget"), [(None, None), ("none", 0), ("minimal", None), ("medium", None), ("xhigh", None)]
)
def test_effort(effort: str | None, budget: int | None) -> None:
    """Guards: agents that are refused, since they send an effort with every request."""
    engine = FakeEngine()
    reasoning: Any = {"effort": effort, "summary": "auto"}
    with serving(engine) as server, openai_client(server) as client:
        client.responses.create(model="fake", input="hi", reasoning=reasoning)
    assert engine.requests[0].reasoning_budget == budget


@pytest.mark.parametrize("reasons", [False, True])
def test_responses(reasons: bool) -> None:
    """Guards: events that OpenAI's client cannot put together; another result streamed than as a whole."""
    engine = FakeEngine(replies=[REASONING if reasons else "Yes"], reasons=reasons)
    asked: Any = {"model": "fake", "input": "hi", "instructions": "be brief", "max_output_tokens": 50}
    with serving(engine) as server, openai_client(server) as client:
        whole = client.responses.create(**asked)
        with client.responses.stream(**asked) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
    assert whole.output_text == streamed.output_text == "Yes"
    assert whole.status == streamed.status == "completed"
    kinds = [item.type for item in whole.output]
    assert kinds == [item.type for item in streamed.output]
    assert kinds == (["reasoning", "message"] if reasons else ["message"])
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.completed"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens
    assert (whole.usage.output_tokens_details.reasoning_tokens > 0) == reasons
    assert engine.requests[0].prompt == (Message("system", "be brief"), Message("user", "hi"))
    assert engine.requests[0].max_tokens == 50


class City(BaseModel):
    name: str


def test_conversations_and_schemas_of_responses() -> None:
    """Guards: a conversation that is sent back and refused; a schema in the newer form that gets lost."""
    engine = FakeEngine(replies=['{"name": "Rome"}'])
    with serving(engine) as server, openai_client(server) as client:
        first = client.responses.parse(model="fake", input="a city", text_format=City)
        assert first.output_parsed == City(name="Rome")
        question = {"role": "user", "content": "a city"}
        history: Any = [question, *first.output, question]
        client.responses.create(model="fake", input=history)
    assert engine.requests[0].json_schema is not None
    roles = [message.role for message in engine.requests[1].prompt if isinstance(message, Message)]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
        ({"extra_body": {"n": 2}}, "n"),
        ({"text": "json"}, "text"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"reasoning": "none"}, "reasoning"),
    ],
)
def test_refused_responses(change: dict[str, Any], param: str) -> None:
    """Guards: a conversation that is answered without its beginning; a schema that is ignored."""
    with serving(FakeEngine()) as server, openai_client(server) as client:
        asked: Any = {"model": "fake", "input": "hi", **change}
        with pytest.raises(openai.BadRequestError) as refusal:
            client.responses.create(**asked)
        assert refusal.value.param == param


def test_a_reply_that_is_cut() -> None:
    """Guards: a status that hides that the limit ended the reply."""
    with serving(FakeEngine(replies=["abcdef"])) as server, openai_client(server) as client:
        reply = client.responses.create(model="fake", input="hi", max_output_tokens=2)
        assert (reply.output_text, reply.status) == ("ab", "incomplete")
        with claude(server) as other:
            message = other.messages.create(model="fake", max_tokens=2, messages=HELLO)  # type: ignore[arg-type]
            assert message.stop_reason == "max_tokens"
