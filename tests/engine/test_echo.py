"""Prompts that replies repeat, with their log-probabilities, against llama.cpp driven barely."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from support import llama_oracle
from support.models import tiny_model

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelOptions,
    ObserverOptions,
    Prompt,
    Request,
    SamplingParameters,
    TokenEvent,
    TokenLogprob,
)

TEXT = "Once upon a time there was a small model. " * 12


@pytest.fixture(scope="module", params=[(True, True), (False, True), (True, False)], ids=str)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    unified, scores_prompts = request.param
    options = ModelOptions(
        tiny_model(),
        n_threads=2,
        n_parallel=3,
        n_context=1536,
        unified=unified,
        cache_type_k="f32",
        scores_prompts=scores_prompts,
    )
    with Engine.load(options) as loaded:
        yield loaded


def request(name: str, prompt: Prompt, **more: Any) -> Request:
    values: dict[str, Any] = {"max_tokens": 3, "echo": True, "logprobs": True, "top_logprobs": 2, **more}
    return Request(name, prompt, SamplingParameters(temperature=0), **values)


def prompt_tokens(events: Sequence[TokenEvent]) -> list[tuple[TokenLogprob, ...]]:
    found: list[tuple[TokenLogprob, ...]] = []
    for event in events:
        found[event.prompt_start : event.prompt_start + len(event.prompt_tokens)] = event.prompt_tokens
    return found


def text_of(events: Sequence[TokenEvent]) -> str:
    return "".join(event.text for event in events)


def check(ids: Sequence[int], found: Sequence[tuple[TokenLogprob, ...]]) -> None:
    """Compare with llama.cpp's log-probabilities."""
    expected = llama_oracle.logprobs(tiny_model(), ids)
    assert [token[0].token_id for token in found] == list(ids)
    assert found[0][0].logprob == 0
    for (chosen, *likeliest), token_id, row in zip(found[1:], ids[1:], expected, strict=True):
        assert chosen.logprob == pytest.approx(row[token_id], abs=2e-2)
        assert len(likeliest) == 2
        assert likeliest[0].logprob == pytest.approx(row.max(), abs=2e-2)
        assert likeliest[0].logprob >= likeliest[1].logprob


def test_prompts_are_scored(engine: Engine) -> None:
    """Guards: log-probabilities at the wrong place where steps are split; a prompt taken from the cache."""
    ids = engine.encode(TEXT)[:230]
    list(engine.submit(request("first", ids, echo=False)))  # now it is in the cache
    texts = engine.decode(ids)
    streams = [engine.submit(request(f"{number}", ids[number:])) for number in range(3)]
    for number, stream in enumerate(streams):
        events = list(stream)
        found = prompt_tokens(events)
        check(ids[number:], found)
        assert [token[0].text for token in found] == list(texts[number:])
        assert events[-1].usage is not None
        assert (events[-1].usage.cached_tokens, events[-1].usage.completion_tokens) == (0, 3)
        assert text_of(events).startswith(engine.detokenize(ids[number:]))


def test_the_reply_stays_the_same(engine: Engine) -> None:
    """Guards: a reply that depends on the size of the steps of its prompt."""
    plain = list(engine.submit(request("plain", TEXT, echo=False, max_tokens=8)))
    echoed = list(engine.submit(request("echo", TEXT, max_tokens=8)))
    unscored = list(engine.submit(request("text", TEXT, max_tokens=8, logprobs=False, top_logprobs=0)))
    assert text_of(echoed) == text_of(unscored) == TEXT + text_of(plain)
    assert not prompt_tokens(unscored)
    assert unscored[-1].usage is not None
    assert unscored[-1].usage.cached_tokens > 0 or not engine.info.unified


@pytest.mark.parametrize("n_ids", [1, 2, 64, 65, 128])
def test_no_reply(engine: Engine, n_ids: int) -> None:
    """Guards: one token too many or too few, where a step ends with the prompt."""
    ids = engine.encode(TEXT)[:n_ids]
    events = list(engine.submit(request("a", ids, max_tokens=0)))
    check(ids, prompt_tokens(events))
    assert (events[-1].finish_reason, events[-1].token_id) == (FinishReason.LENGTH, None)
    assert text_of(events) == engine.detokenize(ids)
    assert all(event.token_id is None for event in events)


def test_scored_prompts_beside_others(engine: Engine) -> None:
    """Guards: a step with more rows of logits than llama.cpp has room for, which ends the process."""
    ids = engine.encode(TEXT)[:200]
    plain = engine.submit(request("plain", ids[3:], echo=False, max_tokens=60))
    next(plain)
    streams = [engine.submit(request(f"{number}", ids)) for number in range(4)]
    for stream in streams:
        check(ids, prompt_tokens(list(stream)))
    assert len([event for event in plain if event.token_id is not None]) >= 50


def test_scored_prompts_after_observers_have_changed(engine: Engine) -> None:
    """Guards: steps as large as the room for logits that an observer had."""
    ids = engine.encode(TEXT)[:200]
    for observers in ((ObserverOptions("logprobs"),), ()):
        engine.set_observers(observers)
        check(ids, prompt_tokens(list(engine.submit(request("a", ids)))))


@pytest.mark.parametrize(
    ("options", "n_rows"),
    [
        ({}, 3),
        ({"scores_prompts": True}, 64),
        ({"scores_prompts": True, "n_ubatch": 32}, 32),
        ({"observers": (ObserverOptions("logprobs"),)}, 512),
    ],
)
def test_room_for_logits(options: dict[str, Any], n_rows: int) -> None:
    """Guards: 50 MB for jobs without such requests; prompts that are processed token by token."""
    with Engine.load(ModelOptions(tiny_model(), n_parallel=3, n_context=1536, **options)) as engine:
        loaded = engine._loaded
        assert loaded is not None
        assert loaded.context.options.n_outputs == n_rows
        observers = (ObserverOptions("routing"), *options.get("observers", ()))
        engine.set_observers(observers)
        assert loaded.context.options.n_outputs == n_rows


def test_deterministic_prompts_beside_scored_ones() -> None:
    """Guards: cells of a scored prompt, which has other steps, shared with prompts that are not scored."""
    options = ModelOptions(
        tiny_model(),
        n_threads=2,
        n_parallel=2,
        n_context=1024,
        deterministic=True,
        n_ubatch=128,
        n_batch=128,
        scores_prompts=True,
    )
    results = []
    for echo in (False, True):
        with Engine.load(options) as engine:
            list(engine.submit(request("a", TEXT, echo=echo)))
            events = list(engine.submit(request("b", TEXT, echo=False, max_tokens=8)))
            results.append([event.logprob for event in events if event.token_id is not None])
    assert results[0] == results[1]


def test_refused_echoes() -> None:
    """Guards: a conversation whose rendered prompt is part of the reply."""
    with pytest.raises(UsageError, match="echo is for prompts"):
        request("a", (Message("user", "hi"),))
    with pytest.raises(UsageError, match="requires n = 1"):
        request("a", "hi", n=2)
