"""What the tests of llama.cpp's server expect, asked of ours. docs/serve.md lists where the two differ.

The model is a tiny one with random weights: a token of its text is a byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from support.models import tiny_model
from support.serving import HELLO, Serving, serving

from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions

N_CONTEXT = 512
PROMPT = "The meaning of life is"


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    options = ModelOptions(
        tiny_model(), n_threads=1, n_context=4 * N_CONTEXT, n_parallel=4, chat_template="deepseek-moe"
    )
    with EngineClient.load(options) as engine, serving(engine) as server:
        yield server


def complete(server: Serving, prompt: Any = PROMPT, **body: Any) -> Any:
    """Return the body of a completion that must succeed."""
    answer = server.send("/v1/completions", {"prompt": prompt, "max_tokens": 8, **body})
    assert answer.status == 200, answer.body
    return answer.json


def text_of(body: Any) -> str:
    return str(body["choices"][0]["text"])


def events(body: bytes) -> list[Any]:
    """Return the data of server-sent events."""
    return [json.loads(line[6:]) for line in body.decode().splitlines() if line.startswith("data: {")]


def test_a_stream_is_the_whole_in_pieces(server: Serving) -> None:
    whole = complete(server)
    answer = server.send("/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "stream": True})
    chunks = events(answer.body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(whole)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


def test_seeds(server: Serving) -> None:
    same = [text_of(complete(server, seed=42, temperature=1)) for _ in range(3)]
    assert len(set(same)) == 1
    different = [text_of(complete(server, seed=seed, temperature=1)) for seed in range(4)]
    assert len(set(different)) == 4


def test_requests_in_parallel(server: Serving) -> None:
    """Each gets the reply that it gets alone."""
    prompts = [f"{number} {PROMPT}" for number in range(6)]
    alone = [text_of(complete(server, prompt)) for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda prompt: text_of(complete(server, prompt)), prompts)) == alone


def test_token_ids_in_prompts(server: Serving) -> None:
    ids = server.send("/tokenize", {"content": PROMPT}).json["tokens"]
    expected = text_of(complete(server))
    assert text_of(complete(server, ids)) == expected
    for prompts in ([ids, ids], [ids, PROMPT]):
        assert [choice["text"] for choice in complete(server, prompts)["choices"]] == [expected] * 2


@pytest.mark.parametrize("limit", ["max_tokens", "n_predict", "max_completion_tokens"])
def test_names_of_the_limit(server: Serving, limit: str) -> None:
    answer = server.send("/v1/completions", {"prompt": PROMPT, limit: 5})
    assert answer.json["usage"]["completion_tokens"] == 5


def test_cached_tokens(server: Serving) -> None:
    """The longest common beginning is taken from the cache, but the last token is always computed."""
    counts = []
    for question in ("1 2 3 4 5 6", "1 2 3 4 5 6", "1 2 3 4 5 9", "1 2 9 9 9 9"):
        usage = server.chat(messages=[{"role": "user", "content": question}], max_tokens=8).json["usage"]
        counts.append((usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
    n_prompt = counts[0][0]
    assert [count[0] for count in counts] == [n_prompt] * 4
    cached = [count[1] for count in counts[1:]]
    assert cached[0] == n_prompt - 1
    assert cached[0] > cached[1] > cached[2] > 0


def test_log_probabilities(server: Serving) -> None:
    scores = complete(server, logprobs=10, max_tokens=5)["choices"][0]["logprobs"]
    assert len(scores["token_logprobs"]) == 5
    assert all(value <= 0 for value in scores["token_logprobs"])
    chat = server.chat(logprobs=True, top_logprobs=10, max_tokens=5).json["choices"][0]["logprobs"]
    for token in chat["content"]:
        assert token["logprob"] <= 0
        assert len(token["top_logprobs"]) == 10


@pytest.mark.parametrize("as_pairs", [False, True])
def test_logit_bias(server: Serving, as_pairs: bool) -> None:
    bias = only_a(server)
    pairs = [[int(token), value] for token, value in bias.items()]
    assert text_of(complete(server, logit_bias=pairs if as_pairs else bias)) == "a" * 8


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("response_format", {"type": "json_object", "schema": {"const": "42"}}, '"42"'),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}}, '"foo"'),
        ("json_schema", {"const": "42"}, '"42"'),
        ("grammar", 'root ::= "a"{5,5}', "aaaaa"),
        ("response_format", {"type": "sound"}, None),
        ("response_format", {"type": "json_object", "schema": 123}, None),
        ("response_format", {"type": "json_object", "schema": {"type": 123}}, None),
        ("response_format", {"type": "json_object", "schema": {"type": "hiccup"}}, None),
        ("grammar", "root ::= this is (not valid GBNF", None),
    ],
)
def test_constrained_replies(server: Serving, field: str, value: Any, expected: str | None) -> None:
    answer = server.chat(**{field: value}, max_tokens=20)
    if expected is None:
        assert answer.status == 400
        assert answer.error["message"]
    else:
        assert answer.json["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "system", "content": 123}],
        [{"content": "hello"}],
        [{"role": "system", "content": "test"}, {}],
    ],
)
def test_invalid_messages(server: Serving, messages: Any) -> None:
    answer = server.send("/v1/chat/completions", {"messages": messages})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


def test_chunks_of_a_chat(server: Serving) -> None:
    """The first one has the role, the one with the reason has no text, the last one has the counts."""
    answer = server.chat(stream=True, stream_options={"include_usage": True}, max_tokens=5)
    *chunks, last = events(answer.body)
    first, *_, ending = (chunk["choices"][0] for chunk in chunks)
    assert first["delta"]["role"] == "assistant"
    assert (ending["delta"], ending["finish_reason"]) == ({}, "length")
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)


def test_a_reply_that_begins_for_the_model(server: Serving) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "Wh"}]
    answer = server.chat(
        messages=begun, add_generation_prompt=False, continue_final_message=True, max_tokens=4
    )
    n_prompt = server.send("/v1/messages/count_tokens", {"messages": begun}).json["input_tokens"]
    assert answer.json["usage"]["prompt_tokens"] == n_prompt
    assert n_prompt > len(server.send("/tokenize", {"messages": HELLO}).json["tokens"])
    both = server.chat(messages=begun, add_generation_prompt=True, continue_final_message=True)
    assert both.status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_context_that_gets_full(server: Serving, stream: bool) -> None:
    """A prompt that is too long is refused. A reply ends with `length` when the context is full."""
    refused = server.send("/v1/completions", {"prompt": "x" * 2 * N_CONTEXT, "stream": stream})
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    answer = server.send(
        "/v1/completions",
        {"prompt": "x" * 480, "max_tokens": -1, "stream": stream, "logit_bias": only_a(server)},
    )
    last = events(answer.body)[-1] if stream else answer.json
    assert last["choices"][0]["finish_reason"] == "length"


def test_context_shift(server: Serving) -> None:
    """With `context_shift`, a reply goes on when the context is full."""
    body = complete(server, "x" * 480, max_tokens=100, context_shift=True, logit_bias=only_a(server))
    assert body["usage"]["completion_tokens"] == 100


def only_a(server: Serving) -> dict[str, float]:
    """Return the bias with which each token of a reply is the letter a."""
    *_, token = server.send("/tokenize", {"content": "a"}).json["tokens"]
    return {str(token): 1000.0}


def test_the_tokenizer_there_and_back(server: Serving) -> None:
    for text in ("What is the capital of France ?", "This is 媽 and 🤗"):
        ids = server.send("/tokenize", {"content": text}).json["tokens"]
        assert server.send("/detokenize", {"tokens": ids[1:]}).json["content"] == text
