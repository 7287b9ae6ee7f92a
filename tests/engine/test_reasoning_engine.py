"""Reasoning with a real model whose template opens <think>: budgets, grammars, usage, the KV cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.models import smollm2

from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelOptions,
    ReplyStart,
    Request,
    SamplingParameters,
    TokenEvent,
    Usage,
)

TEMPLATE = """{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"""
QUESTION = Message("user", "What is the capital of France?")
SCHEMA = json.dumps(
    {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = tmp_path_factory.mktemp("template") / "thinks.jinja"
    path.write_text(TEMPLATE)
    options = ModelOptions(smollm2(), n_context=2048, n_threads=2, chat_template=str(path))
    with Engine.load(options) as loaded:
        yield loaded


def ask(engine: Engine, *messages: Message, **more: Any) -> tuple[str, str, list[TokenEvent]]:
    """Return reasoning, answer and the events."""
    values: dict[str, Any] = {"sampling": SamplingParameters(temperature=0), "max_tokens": 48, **more}
    events = list(engine.submit(Request("r", messages, **values)))
    return "".join(e.reasoning for e in events), "".join(e.text for e in events), events


def usage(events: Sequence[TokenEvent]) -> Usage:
    assert events[-1].usage is not None
    return events[-1].usage


def test_reasoning_is_not_part_of_the_answer(engine: Engine) -> None:
    """Guards: reasoning that the template opened delivered as text."""
    reasoning, answer, events = ask(engine, QUESTION, max_tokens=5)
    assert reasoning
    assert answer == ""
    assert usage(events).reasoning_tokens == usage(events).completion_tokens == 5
    assert all(event.in_reasoning for event in events[:-1])


@pytest.mark.parametrize("budget", [1, 5])
def test_a_budget_ends_reasoning(engine: Engine, budget: int) -> None:
    """Guards: a budget that is not kept, or an answer that does not follow."""
    reasoning, answer, events = ask(engine, QUESTION, reasoning_budget=budget)
    free = ask(engine, QUESTION, max_tokens=budget)[0]
    assert reasoning.strip() == free.strip()
    assert "<" not in answer[:8]
    assert answer
    ids = tuple(event.token_id for event in events[:-1] if event.token_id is not None)
    assert "</think>\n\n" in "".join(engine.decode(ids))
    n_reasoning = usage(events).reasoning_tokens
    assert budget < n_reasoning < usage(events).completion_tokens
    assert n_reasoning == sum(event.in_reasoning for event in events[:-1])


def test_no_budget_is_no_reasoning(engine: Engine) -> None:
    """Guards: a template that could turn reasoning off not told to."""
    reasoning, answer, events = ask(engine, QUESTION, reasoning_budget=0)
    assert (reasoning, usage(events).reasoning_tokens) == ("", 0)
    assert "Paris" in answer
    off = ask(engine, QUESTION, chat_template_kwargs={"enable_thinking": False})
    assert off[1] == answer
    # The template is told to think: then the marker is forced at once.
    forced = ask(engine, QUESTION, reasoning_budget=0, chat_template_kwargs={"enable_thinking": True})
    assert forced[0] == ""
    assert forced[1]


def test_a_schema_constrains_the_answer_only(engine: Engine) -> None:
    """Guards: reasoning forced into JSON, or JSON that is not enforced after it."""
    reasoning, answer, events = ask(engine, QUESTION, reasoning_budget=6, json_schema=SCHEMA)
    assert reasoning
    assert not reasoning.startswith("{")
    assert json.loads(answer)["city"]
    assert events[-1].finish_reason is FinishReason.STOP
    assert json.loads(ask(engine, QUESTION, reasoning_budget=0, json_schema=SCHEMA)[1])["city"]


def test_stop_strings_are_not_looked_for_in_reasoning(engine: Engine) -> None:
    """Guards: reasoning cut at a stop string."""
    free, _, _ = ask(engine, QUESTION, max_tokens=5)
    word = free.split()[1]
    assert ask(engine, QUESTION, max_tokens=5, stop=(word,))[0] == free


def test_other_prompts_are_not_parsed(engine: Engine) -> None:
    """Guards: text completions of a reasoning model that lose their tags."""
    text = "<|im_start|>assistant\n<think>\n"
    request = Request("r", text, SamplingParameters(temperature=0), max_tokens=8)
    events = list(engine.submit(request))
    assert "".join(event.text for event in events)
    assert not any(event.reasoning or event.in_reasoning for event in events)


def test_the_chat_may_pass_ids(engine: Engine) -> None:
    """Guards: a conversation that was encoded by the caller treated as a text."""
    ids = engine.encode((QUESTION,))
    request = Request(
        "r", ids, SamplingParameters(temperature=0), max_tokens=8, reply_start=ReplyStart.DETECT
    )
    assert all(not event.text for event in engine.submit(request))


def test_the_cache_is_reused_up_to_the_dropped_reasoning(engine: Engine) -> None:
    """Guards: a second turn that reads the first one again, or that keeps reasoning the template drops."""
    first = ask(engine, QUESTION, reasoning_budget=5)
    ids = tuple(event.token_id for event in first[2][:-1] if event.token_id is not None)
    reply = Message("assistant", first[1], ids, first[0])
    prompt = (QUESTION, reply, Message("user", "And of Spain?"))
    text = "".join(engine.decode(engine.encode(prompt)))
    assert text.endswith(f"assistant\n{first[1]}<|im_end|>\n<|im_start|>user\nAnd of Spain?<|im_end|>\n"
                         "<|im_start|>assistant\n<think>\n")  # fmt: skip
    second = ask(engine, *prompt, reasoning_budget=5)
    n_first = len(engine.encode((QUESTION,)))
    # All of the first prompt but its <think>.
    assert n_first - 6 <= usage(second[2]).cached_tokens <= n_first
