"""Reasoning in batches: fields of lines, records in both formats, settings of the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletion
from support.batches import answer, batch, by_id
from support.fake_engine import FakeEngine

from dsmoe_local.engine.types import Message

WRITTEN = "<think>\nhm\n</think>\n\nyes"
QUESTION: dict[str, Any] = {"role": "user", "content": "q"}


def engine() -> FakeEngine:
    return FakeEngine(replies=[WRITTEN], reasons=True)


def chat(name: str, **body: Any) -> dict[str, Any]:
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [QUESTION], **body},
    }


def test_openai_records_have_the_reasoning_beside_the_content(tmp_path: Path) -> None:
    """Guards: reasoning in the content; a record that OpenAI's types refuse; tokens that are not counted."""
    lines = [chat("a", logprobs=True), chat("two", n=2), chat("off", reasoning_budget=0)]
    found = by_id(answer(engine(), batch(tmp_path, *lines, form="openai")))
    body = found["a"]["response"]["body"]
    parsed = ChatCompletion.model_validate(body, strict=True)
    (choice,) = parsed.choices
    assert choice.message.content == "yes"
    assert body["choices"][0]["message"]["reasoning_content"] == "hm"
    assert parsed.usage is not None
    assert parsed.usage.completion_tokens_details is not None
    # A byte is a token here: all of the reasoning and its end.
    assert parsed.usage.completion_tokens_details.reasoning_tokens == len("\nhm\n</think>")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content).strip() == "yes"
    two = found["two"]["response"]["body"]
    assert [each["message"]["reasoning_content"] for each in two["choices"]] == ["hm", "hm"]
    off = found["off"]["response"]["body"]
    assert "reasoning_content" not in off["choices"][0]["message"]
    assert "completion_tokens_details" not in off["usage"]


def test_simple_records(tmp_path: Path) -> None:
    """Guards: reasoning lost in the simple format, or an empty field for models that do not reason."""
    lines: list[dict[str, Any]] = [
        {"id": "a", "messages": [QUESTION]},
        {"id": "two", "messages": [QUESTION], "n": 2},
    ]
    found = by_id(answer(engine(), batch(tmp_path, *lines)))
    assert (found["a"]["text"], found["a"]["reasoning_content"]) == ("yes", "hm")
    assert found["two"]["reasoning_content"] == ["hm", "hm"]
    other = batch(tmp_path, {"id": "b", "messages": [QUESTION]}, out=tmp_path / "plain.jsonl")
    assert "reasoning_content" not in by_id(answer(FakeEngine(), other))["b"]


def test_prompts_are_completed_as_they_are(tmp_path: Path) -> None:
    """Guards: tags removed from the completion of a text."""
    (record,) = answer(engine(), batch(tmp_path, {"prompt": "x"}))
    assert record["text"] == WRITTEN


def test_lines_override_the_command(tmp_path: Path) -> None:
    """Guards: variables of the command lost when a line has its own; -1 that is not "no limit"."""
    fake = engine()
    options = batch(
        tmp_path,
        {"id": "a", "messages": [QUESTION]},
        {"id": "b", "messages": [QUESTION], "chat_template_kwargs": {"y": [1]}, "reasoning_budget": -1},
        {"id": "c", "messages": [QUESTION], "reasoning_effort": "none"},
    )
    defaults = replace(options.defaults, reasoning_budget=7, chat_template_kwargs={"x": 1})
    answer(fake, replace(options, defaults=defaults))
    asked = {request.id: request for request in fake.requests}
    assert {name: request.reasoning_budget for name, request in asked.items()} == {"a": 7, "b": None, "c": 0}
    assert asked["a"].chat_template_kwargs == asked["c"].chat_template_kwargs == {"x": 1}
    assert asked["b"].chat_template_kwargs == {"x": 1, "y": [1]}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_messages_may_have_reasoning(tmp_path: Path, key: str) -> None:
    """Guards: conversations from other programs refused, or their reasoning dropped before the template."""
    fake = engine()
    replied = {"role": "assistant", "content": "yes", key: "hm"}
    answer(fake, batch(tmp_path, {"messages": [QUESTION, replied, QUESTION]}))
    assert fake.requests[0].prompt[1] == Message("assistant", "yes", (), "hm")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs is not an object"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"reasoning_budget": -2}, "reasoning_budget"),
        ({"reasoning_effort": "high"}, "reasoning_effort is not supported"),
        ({"messages": [{**QUESTION, "reasoning_content": "x"}]}, "only messages of the role assistant"),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning": [1]}]}, "reasoning is not text"),
    ],
)
def test_what_is_refused(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    """Guards: fields that are ignored without a word."""
    (record,) = answer(engine(), batch(tmp_path, {"messages": [QUESTION], **fields}))
    assert told in record["error"]["message"]
