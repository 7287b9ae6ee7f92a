"""/v1/completions as evaluation harnesses use it: several prompts, echoes, log-probabilities of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from support.fake_engine import FakeEngine
from support.serving import Serving, serving

from dsmoe_local.engine.errors import NativeError


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(n_parallel=4, n_context=64)


@pytest.fixture
def server(engine: FakeEngine) -> Iterator[Serving]:
    with serving(engine) as server:
        yield server


@pytest.fixture
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        (["a", "bc", "d"], ["a", "bc", "d"]),
        ([[98], [99, 100]], ["a", "bc"]),
        (["a", [99]], ["a", "b"]),
        (["only"], ["only"]),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_several_prompts(client: OpenAI, prompts: Any, texts: list[str], n: int) -> None:
    """Guards: choices in another order than the prompts; tokens that are counted once for all prompts."""
    asked: Any = {"model": "fake", "prompt": prompts, "n": n}
    whole = client.completions.create(**asked)
    expected = [text for text in texts for _ in range(n)]
    assert [choice.text for choice in whole.choices] == expected
    assert [choice.index for choice in whole.choices] == list(range(len(expected)))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(map(len, texts))
    assert whole.usage.completion_tokens == sum(map(len, expected))
    streamed = [""] * len(expected)
    for chunk in client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] += choice.text
    assert streamed == expected


def test_a_large_field_of_several_prompts(server: Serving, engine: FakeEngine) -> None:
    """Guards: other fields that are read and stored once for each prompt, while all other clients wait."""
    bias = {str(token_id): 1 for token_id in range(200)}
    answer = server.send("/v1/completions", {"prompt": ["a", [99], "c"], "logit_bias": bias})
    assert [choice["text"] for choice in answer.json["choices"]] == ["a", "b", "c"]
    assert len({request.id for request in engine.requests}) == 3
    first, *others = (request.logit_bias for request in engine.requests)
    assert len(first) == 200
    assert all(other is first for other in others)


@pytest.mark.parametrize("prompt", ["ab", [98, 99]])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("limit", "text"), [(0, "ab"), (1, "aba"), (None, "abab")])
def test_echo(client: OpenAI, prompt: Any, stream: bool, limit: int | None, text: str) -> None:
    """Guards: log-probabilities that a harness reads at the wrong place; a token where none was asked for."""
    asked: Any = {"model": "fake", "prompt": prompt, "max_tokens": limit, "echo": True, "logprobs": 1}
    if stream:
        choices = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    else:
        choices = client.completions.create(**asked).choices
    assert "".join(choice.text for choice in choices) == text
    assert choices[-1].finish_reason == ("stop" if limit is None else "length")
    scores = [choice.logprobs for choice in choices if choice.logprobs is not None]
    # The end token has a score, but no text.
    tokens = [*text, "<end>"] if limit is None else list(text)
    assert [token for score in scores for token in score.tokens or ()] == tokens
    assert [value for score in scores for value in score.token_logprobs or ()] == [
        None,
        *[0.0] * (len(tokens) - 1),
    ]
    top = [values for score in scores for values in score.top_logprobs or ()]
    assert top == [None, *({token: 0.0} for token in tokens[1:])]
    assert [place for score in scores for place in score.text_offset or ()] == list(range(len(tokens)))


def test_echoed_text(client: OpenAI, engine: FakeEngine) -> None:
    """Guards: log-probabilities of the prompt that nobody asked for, since they take time."""
    reply = client.completions.create(model="fake", prompt=["a", "b"], echo=True, n=2)
    assert [choice.text for choice in reply.choices] == ["aa", "aa", "bb", "bb"]
    assert not any(request.scores_prompt for request in engine.requests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 2}, "best_of is not supported"),
        ({"prompt": ["a"] * 300}, "300 prompts; send at most 256"),
        ({"prompt": []}, "empty list"),
        ({"prompt": ["a", ""]}, ""),
        ({"prompt": ["a", "b" * 99]}, "99 tokens, the context holds 64"),
        ({"prompt": ["a", 5]}, "not a whole number"),
        ({"echo": True, "logprobs": 1, "n": 2}, "requires n = 1"),
        ({"max_tokens": -2}, "max_tokens"),
    ],
)
def test_refused_completions(client: OpenAI, server: Serving, change: dict[str, Any], message: str) -> None:
    """Guards: some of the replies without the others; a field that is ignored; a slot that is lost."""
    asked: Any = {"model": "fake", "prompt": "a", **change}
    if message:
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(**asked)
    assert server.send("/health").json == {"status": "ok", "running": 0, "queued": 0}


def test_echo_is_for_prompts(server: Serving) -> None:
    """Guards: a rendered conversation that becomes part of the reply."""
    answer = server.chat(echo=True)
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert "echo is for prompts" in answer.error["message"]
    assert server.chat(echo=False).status == 200


def test_one_of_several_fails() -> None:
    """Guards: a client that waits for the others, or that gets replies with a gap."""

    def gate(index: int) -> None:
        if index == 2:
            raise NativeError("llama.cpp failed")

    with serving(FakeEngine(gate=gate, n_parallel=4)) as server:
        answer = server.send("/v1/completions", {"prompt": ["a", "b" * 9, "c"]})
        assert (answer.status, answer.error["message"]) == (503, "llama.cpp failed")
        assert server.send("/health").json["running"] == 0
