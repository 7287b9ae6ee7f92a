"""Clients that talk to a real model: a tiny one with random weights, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from operator import itemgetter
from typing import Any

import anthropic
import pytest
from langchain_openai import ChatOpenAI
from openai import OpenAI
from support import llama_oracle
from support.models import tiny_model
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ANSWERS = [{"city": city, "days": days} for city in ("Paris", "Rome") for days in (1, 2)]


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    options = ModelOptions(
        tiny_model(),
        n_threads=1,
        n_context=4096,
        n_parallel=4,
        chat_template="deepseek-moe",
        cache_type_k="f32",
    )
    with EngineClient.load(options) as engine, serving(engine) as server:
        yield server


@pytest.fixture
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(("max_tokens", "ends"), [(0, False), (1, False), (1, True)])
def test_log_likelihoods_of_a_harness(server: Serving, max_tokens: int, ends: bool) -> None:
    """Guards: scores of lm-evaluation-harness that are off by a token, or not those of the model; a token too
    few if the model would end its reply.

    The body and the reading of the response follow its `local-completions`, which sends 1 as max_tokens, and
    leaves out the last token.
    """
    texts = [("A capital is ", "Paris"), ("A capital is ", "a city"), ("x" * 150, "y" * 20)]
    pairs = []
    for text, continuation in texts:
        ids = [
            server.send("/tokenize", {"content": part}).json["tokens"] for part in (text, text + continuation)
        ]
        pairs.append((len(ids[0]), ids[1]))
    body = {
        "model": "fake",
        "prompt": [ids for _, ids in pairs],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    if ends:
        with llama_oracle.vocabulary(tiny_model()) as vocabulary:
            body["logit_bias"] = {str(vocabulary.special()["eos"]): 100}
    choices = sorted(server.send("/v1/completions", body).json["choices"], key=itemgetter("index"))
    for (n_context, ids), choice in zip(pairs, choices, strict=True):
        assert choice["finish_reason"] == ("stop" if ends else "length")
        scores = choice["logprobs"]
        assert len(scores["tokens"]) == len(ids) + max_tokens
        end = len(ids)
        expected = llama_oracle.logprobs(tiny_model(), ids)
        rows = range(n_context - 1, end - 1)
        chosen = [expected[row, ids[row + 1]] for row in rows]
        assert scores["token_logprobs"][n_context:end] == pytest.approx(chosen, abs=2e-2)
        greedy = [max(top.values()) for top in scores["top_logprobs"][n_context:end]]
        assert greedy == pytest.approx([expected[row].max() for row in rows], abs=2e-2)


def test_offsets_of_tokens(server: Serving) -> None:
    """Guards: offsets that count the text of the BOS, which is not part of the text."""
    body = {"prompt": "A capital is Paris", "max_tokens": 2, "echo": True, "logprobs": 0}
    (choice,) = server.send("/v1/completions", body).json["choices"]
    scores = choice["logprobs"]
    with llama_oracle.vocabulary(tiny_model()) as vocabulary:
        assert vocabulary.special()["add_bos"]
    assert (scores["tokens"][0], scores["text_offset"][:2]) == ("", [0, 0])
    places = zip(scores["tokens"], scores["text_offset"], strict=True)
    assert all(choice["text"].startswith(token, offset) for token, offset in places)


def test_tool_calls_of_all_apis(server: Serving, client: OpenAI) -> None:
    """Guards: a call whose arguments do not follow the schema, in one of the three forms."""
    function: Any = {"name": "weather", "parameters": SCHEMA}
    chat_request: Any = {
        "model": "fake",
        "messages": HELLO,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    chat = client.chat.completions.create(**chat_request)
    (call,) = chat.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments) in ANSWERS
    responses: Any = {"model": "fake", "input": "hi", "tools": [{"type": "function", **function}]}
    choice: Any = {"type": "function", "name": "weather"}
    with client.responses.stream(**responses, tool_choice=choice) as stream:
        (item,) = stream.get_final_response().output
    assert item.type == "function_call"
    assert json.loads(item.arguments) in ANSWERS
    asked: Any = {"model": "fake", "max_tokens": 200, "messages": HELLO}
    tools: Any = [{"name": "weather", "input_schema": SCHEMA}]
    with (
        anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as other,
        other.messages.stream(
            **asked, tools=tools, tool_choice={"type": "tool", "name": "weather"}
        ) as messages,
    ):
        (block,) = messages.get_final_message().content
    assert block.type == "tool_use"
    assert block.input in ANSWERS


def test_counted_tokens_are_those_of_the_prompt(server: Serving) -> None:
    """Guards: a count without the template, or with the beginning of another reply."""
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        for messages in (HELLO, [*HELLO, {"role": "assistant", "content": "well"}]):
            asked: Any = {"model": "fake", "messages": messages, "system": "be brief"}
            counted = client.messages.count_tokens(**asked).input_tokens
            usage = client.messages.create(**asked, max_tokens=1).usage
            assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_stop_sequences_of_a_model(server: Serving) -> None:
    """Guards: a stop sequence that gets lost between the engine's process and the client."""
    asked: Any = {"model": "fake", "messages": HELLO, "max_tokens": 24}
    with anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0) as client:
        (block,) = client.messages.create(**asked).content
        assert block.type == "text"
        stop = block.text[5:7]
        message = client.messages.create(**asked, stop_sequences=["none of this", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_streams_of_langchain(server: Serving) -> None:
    """Guards: pieces that do not add up, or counts that the client does not find."""
    options: Any = {"model": "fake", "base_url": f"{server.url}/v1", "api_key": "-", "max_retries": 0}
    model = ChatOpenAI(**options, temperature=0, max_completion_tokens=20, stream_usage=True)
    whole = model.invoke("hi")
    chunks = list(model.stream("hi"))
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content
    counts = [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]
    assert counts == [whole.usage_metadata["output_tokens"]]  # type: ignore[index]
    assert len(model.batch([f"number {number}" for number in range(8)])) == 8
