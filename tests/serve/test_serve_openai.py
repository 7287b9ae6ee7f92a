"""OpenAI's own client as the oracle of the API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from support.fake_engine import FakeEngine
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.errors import NativeError, too_long


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(n_parallel=4)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Serving]:
    with serving(engine) as server:
        yield server


@pytest.fixture
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_chat(client: OpenAI) -> None:
    """Guards: a reply that OpenAI's client cannot read."""
    reply = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    (choice,) = reply.choices
    assert (choice.message.content, choice.finish_reason) == ("user: hi", "stop")
    assert reply.model == "fake"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (9, 8)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == "user: hi"


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"prompt": "é🚀"}, "é🚀"),
        ({"prompt": [98, 99]}, "ab"),
        ({"prompt": "abc", "max_tokens": 2}, "ab"),
        ({"prompt": "abcd", "stop": "c"}, "ab"),
    ],
)
def test_completions(client: OpenAI, asked: dict[str, Any], text: str) -> None:
    """Guards: the two endpoints confused; a streamed text that differs."""
    reply = client.completions.create(model="fake", logprobs=2, **asked)
    (choice,) = reply.choices
    assert choice.text == text
    streamed = list(client.completions.create(model="fake", logprobs=2, stream=True, **asked))
    assert "".join(chunk.choices[0].text for chunk in streamed) == text
    assert streamed[-1].choices[0].finish_reason == choice.finish_reason
    scores = [chunk.choices[0].logprobs for chunk in streamed]
    assert choice.logprobs is not None
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [part for score in scores for part in getattr(score, name)]
        assert parts == getattr(choice.logprobs, name)


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream(client: OpenAI, usage: bool) -> None:
    """Guards: a role in each chunk; counts in the wrong chunk, or without being asked for."""
    options: Any = {"stream_options": {"include_usage": True}} if usage else {}
    asked: Any = {"model": "fake", "messages": HELLO, "stream": True, **options}
    chunks: Any = list(client.chat.completions.create(**asked))
    counts = chunks.pop() if usage else None
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(delta.content or "" for delta in deltas) == "user: hi"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    if counts is not None:
        assert counts.choices == []
        assert (counts.usage.prompt_tokens, counts.usage.completion_tokens) == (9, 8)


def test_several_replies(client: OpenAI) -> None:
    """Guards: chunks of several replies mixed up."""
    asked: Any = {"model": "fake", "messages": HELLO, "n": 3, "max_tokens": 4}
    whole = client.chat.completions.create(**asked)
    assert [choice.message.content for choice in whole.choices] == ["user"] * 3
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == ["user"] * 3


def test_streamed_log_probabilities(client: OpenAI) -> None:
    """Guards: tokens whose log-probabilities are in no chunk, because their text was held back."""
    asked: Any = {"model": "fake", "messages": [{"role": "user", "content": "é🚀"}], "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0].logprobs
    scores: list[Any] = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        found = chunk.choices[0].logprobs
        scores += (found.content or []) if found else []
    assert whole is not None
    assert scores == whole.content


def test_reasoning() -> None:
    """Guards: reasoning inside the content; white space at its end that only one of the forms has."""
    engine = FakeEngine(replies=["<think>\nlet me\n\nsee\n\n</think>\n\nYes"], reasons=True)
    with serving(engine) as server, OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        asked: Any = {"model": "fake", "messages": HELLO}
        whole: Any = client.chat.completions.create(**asked).choices[0].message
        chunks = list(client.chat.completions.create(**asked, stream=True))
        deltas: Any = [chunk.choices[0].delta for chunk in chunks]
        assert whole.content == "Yes"
        assert whole.reasoning_content == "let me\n\nsee"
        assert "".join(delta.content or "" for delta in deltas) == whole.content
        reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        assert reasoning == whole.reasoning_content


class Colour(BaseModel):
    name: str
    red: int


def test_parsed_replies(server: Serving, engine: FakeEngine) -> None:
    """Guards: a schema that gets lost on the way to the engine."""
    answer = Colour(name="teal", red=0)
    engine._replies = iter([answer.model_dump_json()] * 2)  # type: ignore[assignment]
    with OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        asked: Any = {"model": "fake", "messages": HELLO, "response_format": Colour}
        assert client.chat.completions.parse(**asked).choices[0].message.parsed == answer
        with client.chat.completions.stream(**asked) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == answer
    schema = engine.requests[0].json_schema
    assert schema is not None
    assert json.loads(schema)["properties"].keys() == {"name", "red"}


class Weather(BaseModel):
    """Return the weather."""

    city: str


CALL = '<tool_call>\n{"name": "Weather", "arguments": {"city": "Par\\u00eds"}}\n</tool_call>'


@pytest.mark.parametrize("before", ["", "Let me see."])
def test_tool_calls(server: Serving, engine: FakeEngine, before: str) -> None:
    """Guards: streamed calls with wrong indices, an id in more than one delta, or no finish reason."""
    engine._replies = iter([f"{before}\n{CALL}\n{CALL}"] * 3)  # type: ignore[assignment]
    with OpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
        asked: Any = {"model": "fake", "messages": HELLO, "tools": [openai.pydantic_function_tool(Weather)]}
        whole: Any = client.chat.completions.parse(**asked).choices[0]
        assert (whole.message.content, whole.finish_reason) == (before or None, "tool_calls")
        for call in whole.message.tool_calls:
            assert call.function.parsed_arguments == Weather(city="París")
        chunks: Any = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
        with client.chat.completions.stream(**asked) as stream:
            final: Any = stream.get_final_completion().choices[0]
    assert [call.function.arguments for call in final.message.tool_calls] == [
        call.function.arguments for call in whole.message.tool_calls
    ]
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or []]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == before
    for index in (0, 1):
        first, *others = [part for part in parts if part.index == index]
        assert (first.function.name, first.type) == ("Weather", "function")
        assert first.id
        assert not any(part.id or part.function.name or part.type for part in others)
        arguments = "".join(part.function.arguments for part in (first, *others))
        assert json.loads(arguments) == {"city": "París"}
    assert parts == sorted(parts, key=lambda part: part.index)


def test_async_client(server: Serving) -> None:
    """Guards: requests that wait for each other."""

    async def ask() -> list[str | None]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as client:
            questions: Any = [[{"role": "user", "content": str(number)}] for number in range(20)]
            replies = await asyncio.gather(
                *(client.chat.completions.create(model="fake", messages=each) for each in questions)
            )
            return [reply.choices[0].message.content for reply in replies]

    assert asyncio.run(ask()) == [f"user: {number}" for number in range(20)]


def test_models(client: OpenAI) -> None:
    """Guards: a list that OpenAI's client cannot read."""
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "dsmoe-local"
    with pytest.raises(openai.NotFoundError) as refusal:
        client.models.retrieve("gpt-4o")
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": 900}, "temperature", "temperature = 900.0 is out of range"),
        ({"temperature": "hot"}, "temperature", "temperature is not a number"),
        ({"extra_body": {"audio": {"voice": "x"}}}, "audio", "audio is not supported"),
        ({"extra_body": {"stream": "yes"}}, "stream", "stream is neither true nor false"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options", "stream: true"),
        ({"messages": []}, "messages", "messages is not a list of messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "role tool takes tool_call_id"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools", "'custom' is not supported"),
        ({"tool_choice": "required"}, "tools", "a call is required, but there are no tools"),
        ({"tool_choice": "any"}, "tool_choice", "any"),
        ({"extra_body": {"parallel_tool_calls": "no"}}, "parallel_tool_calls", "neither true nor false"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differ"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(client: OpenAI, change: dict[str, Any], param: str, message: str, stream: bool) -> None:
    """Guards: a mistake that is reported without its field, or inside a stream that has begun."""
    asked: Any = {"model": "fake", "messages": HELLO, **({"stream": True} if stream else {}), **change}
    if stream and param == "stream_options":
        pytest.skip("allowed")
    with pytest.raises(openai.BadRequestError, match=message) as refusal:
        client.chat.completions.create(**asked)
    assert (refusal.value.type, refusal.value.param) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/chat/completions", {"mesages": HELLO}, "'mesages': did you mean messages?"),
        ("/v1/completions", {"promt": "a"}, "'promt': did you mean prompt?"),
        ("/v1/completions", {}, "prompt is missing; set it"),
        ("/v1/messages", {"max_tokens": 1, "message": HELLO}, "'message': did you mean messages?"),
        ("/v1/responses", {"inputs": "a"}, "'inputs': did you mean input?"),
    ],
)
def test_a_misspelled_field(server: Serving, path: str, body: dict[str, Any], message: str) -> None:
    """Guards: a body without messages that is told not to have a prompt, which it has not."""
    answer = server.send(path, body)
    assert answer.status == 400
    assert message in answer.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context(client: OpenAI, stream: bool) -> None:
    """Guards: a prompt that is cut in silence; a message without the numbers, or with advice that fails."""
    with pytest.raises(openai.BadRequestError, match=r"5,000 tokens, the context holds 4,096") as refusal:
        client.completions.create(model="fake", prompt="a" * 5000, stream=stream)
    assert refusal.value.code == "context_length_exceeded"
    assert "trained for no more" in refusal.value.message


@pytest.mark.parametrize(
    ("n_trained", "remedy"),
    [
        (100, "shorten it; the model was trained for no more"),
        (101, "shorten it, or use a longer context (-c, at most 101)"),
    ],
)
def test_a_longer_context_is_advised_only_if_the_model_has_it(n_trained: int, remedy: str) -> None:
    """Guards: advice to raise -c, which is reduced to what the model was trained for."""
    assert too_long("120 tokens", 100, n_trained).remedy == remedy


@pytest.mark.parametrize("n_before", [0, 3])
def test_a_failure_while_streaming(n_before: int) -> None:
    """Guards: a stream that just ends; an error before the first token with status 200."""

    def gate(index: int) -> None:
        if index == n_before:
            raise NativeError("llama.cpp failed")

    with serving(FakeEngine(gate=gate)) as server:
        seen: list[str] = []
        with (
            OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client,
            pytest.raises(openai.APIError, match=r"llama\.cpp failed") as failure,
        ):
            seen.extend(
                chunk.choices[0].text
                for chunk in client.completions.create(model="fake", prompt="abcdef", stream=True)
            )
        assert "".join(seen) == "abcdef"[:n_before]
        assert isinstance(failure.value, openai.InternalServerError) == (n_before == 0)
        assert failure.value.type == "server_error"
