"""OpenAI's batch format: the openai package's own types are the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from openai.types import BatchError, Completion
from openai.types.chat import ChatCompletion
from support.batches import answer, batch, by_id
from support.fake_engine import FakeEngine

from dsmoe_local.engine.types import TokenLogprob
from dsmoe_local.protocol.responses import completion_scores


def line(custom_id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "m", **body}}


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    return line(custom_id, "/v1/chat/completions", messages=messages, **body)


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    return line(custom_id, "/v1/completions", **body)


@pytest.fixture
def found(tmp_path: Path) -> dict[str, dict[str, Any]]:
    lines = [
        chat("chat", logprobs=True, top_logprobs=2),
        chat("two", n=2, max_tokens=3),
        completion("text", prompt="é🚀", logprobs=2),
        completion("long", prompt="abc", max_tokens=2),
        {"prompt": "short"},
        chat("functions", functions=[{"name": "f"}]),
    ]
    return by_id(answer(FakeEngine(), batch(tmp_path, *lines, form="openai")))


def body(record: dict[str, Any]) -> dict[str, Any]:
    assert record["error"] is None
    assert record["id"].startswith("batch_req_")
    response: dict[str, Any] = record["response"]
    assert response["status_code"] == 200
    assert response["request_id"].startswith("req_")
    return dict(response["body"])


def test_chat_completions(found: dict[str, dict[str, Any]]) -> None:
    """Guards: a record that OpenAI's own types refuse."""
    reply = ChatCompletion.model_validate(body(found["chat"]), strict=True)
    (choice,) = reply.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        "user: hi",
        "assistant",
        "stop",
    )
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first = choice.logprobs.content[0]
    assert (first.token, first.logprob, first.bytes) == ("u", 0.0, [0x75])
    assert [other.token for other in first.top_logprobs] == ["u", "t"]
    # JSON has no infinity.
    assert first.top_logprobs[1].logprob == -9999.0


def test_several_choices(found: dict[str, dict[str, Any]]) -> None:
    """Guards: `n` replies under one index, or only one of them."""
    reply = ChatCompletion.model_validate(body(found["two"]), strict=True)
    assert [(choice.index, choice.message.content) for choice in reply.choices] == [(0, "use"), (1, "use")]
    assert {choice.finish_reason for choice in reply.choices} == {"length"}
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 6


def test_completions(found: dict[str, dict[str, Any]]) -> None:
    """Guards: the chat form of log-probabilities used for completions."""
    reply = Completion.model_validate(body(found["text"]), strict=True)
    assert reply.choices[0].text == "é🚀"
    scores = reply.choices[0].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.token_logprobs is not None
    assert scores.top_logprobs is not None
    # The end token, which has no text, comes last.
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.top_logprobs) == 7
    long = Completion.model_validate(body(found["long"]), strict=True)
    assert (long.choices[0].text, long.choices[0].finish_reason) == ("ab", "length")
    assert Completion.model_validate(body(found["line-5"]), strict=True).choices[0].text == "short"


def test_alternatives_with_one_text() -> None:
    """Guards: the value of a part of a character in place of the chosen token's."""
    likeliest, chosen, other = (
        TokenLogprob(n, text, -n) for n, text in ((1, "\ufffd"), (2, "\ufffd"), (3, "a"))
    )
    scores, _ = completion_scores(((chosen, (likeliest, chosen, other)), (other, (likeliest, chosen))))
    assert scores["top_logprobs"] == [{"\ufffd": -2, "a": -3}, {"\ufffd": -1}]


def test_errors(found: dict[str, dict[str, Any]]) -> None:
    """Guards: an error without its line or its field."""
    assert found["functions"]["response"] is None
    error = BatchError.model_validate(found["functions"]["error"], strict=True)
    assert (error.code, error.line) == ("invalid_request", 6)
    assert error.message is not None
    assert "functions is not supported" in error.message


def test_ids_of_records_differ(found: dict[str, dict[str, Any]]) -> None:
    """Guards: records that a database keyed by id would merge."""
    assert len({record["id"] for record in found.values()}) == len(found)
