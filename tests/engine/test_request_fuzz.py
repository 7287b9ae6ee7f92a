"""Random requests, valid and not: each invalid one is an error of its own, the valid ones reply as ever."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import pytest
from support.models import tiny_model

from dsmoe_local.base.errors import DsmoeError, UsageError
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import PromptError
from dsmoe_local.engine.parameters import RANGES, REQUEST_RANGES
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelOptions,
    ObserverOptions,
    ReplyStart,
    Request,
    SamplingParameters,
    TokenEvent,
)

N_CONTEXT = 128
N_VOCAB = 640
AT_ONCE = 6
CONTROLS: tuple[dict[str, Any], ...] = (
    {"prompt": "a fox", "sampling": SamplingParameters(temperature=0), "max_tokens": 9, "logprobs": True},
    {
        "prompt": (7, 8, 9, 10),
        "sampling": SamplingParameters(temperature=1.5, seed=4),
        "max_tokens": 9,
        "n": 2,
    },
    {"prompt": "x", "sampling": SamplingParameters(seed=1), "json_schema": '{"enum": ["one", "two"]}'},
)
"""Requests whose replies are known: whatever else runs, they must stay the same."""

Choice = Callable[[random.Random], Any]


def one_of(*values: Any) -> Choice:
    return lambda rng: rng.choice(values)


def ids(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randrange(N_VOCAB) for _ in range(rng.choice((1, 2, 10, 40, N_CONTEXT - 1))))


def messages(rng: random.Random) -> tuple[Message, ...]:
    roles = ("user", "assistant", "user", "assistant", "user")[: rng.choice((1, 2, 3, 5))]
    return tuple(Message(role, text(rng), ids(rng)[:9] if role == "assistant" else ()) for role in roles)


def text(rng: random.Random) -> str:
    return rng.choice(
        ("a", "The quick brown fox", "é中\N{GRINNING FACE}", "\ud800\u202e", "<｜end▁of▁sentence｜>")
    )


def foreign_messages(rng: random.Random) -> tuple[Message, ...]:
    wrong = rng.choice((N_VOCAB, -1, 10_000_000, 2**40, -(2**70)))
    return (Message("user", "a"), Message("assistant", "b", (*ids(rng)[:3], wrong)), Message("user", "c"))


VALID: dict[str, Choice] = {
    "prompt": lambda rng: rng.choice((text, ids, messages))(rng),
    "max_tokens": one_of(1, 2, 7, 30, None),
    "stop": one_of((), ("a",), ("e", "th"), ("\ud800",)),
    "n": one_of(1, 1, 1, 2, 3),
    "logprobs": one_of(False, True),
    "top_logprobs": one_of(0, 0, 1, 20),
    "logit_bias": one_of((), ((5, 3.0), (5, -1)), tuple((i, -100.0) for i in range(N_VOCAB)), ((0, 1000),)),
    "context_shift": one_of(False, True),
    "n_keep": one_of(0, 1, 50, 10**9),
    "score_from": one_of(None, None, 0, 5, 10**9),
    "continue_final_message": one_of(False, False, True),
    "grammar": one_of(None, None, 'root ::= "a"+', 'root ::= "\u4e2d" [a-z]*', "root ::= root?"),
    "json_schema": one_of(None, None, '{"type": "integer"}', '{"enum": [1, "a"]}', "true"),
    "reply_start": one_of(None, *ReplyStart),
    "reasoning_budget": one_of(None, 0, 1, 2**70),
    "chat_template_kwargs": one_of({}, {"enable_thinking": False}, {"x": [{"y": None}], "bos_token": "z"}),
}
SAMPLING: dict[str, Choice] = {
    "temperature": one_of(0, 0.0, 1e-9, 1, 100),
    "top_k": one_of(0, 1, 40, 10**6, 2**31 - 1),
    "top_p": one_of(0, 0.5, 1),
    "min_p": one_of(0, 1),
    "typical_p": one_of(0, 0.3, 1),
    "repeat_penalty": one_of(0.01, 1, 100),
    "repeat_last_n": one_of(0, 1, 64, 2**20),
    "presence_penalty": one_of(-100, 0, 100),
    "frequency_penalty": one_of(-100, 0, 2),
    "mirostat": one_of(0, 1, 2),
    "mirostat_tau": one_of(0, 5, 100),
    "mirostat_eta": one_of(0, 1),
    "seed": one_of(None, 0, 2**32 - 2),
}
WRONG_NUMBERS: tuple[Any, ...] = (
    None,
    -1,
    2**64,
    1.5,
    float("nan"),
    float("inf"),
    "1",
    True,
    [],
    -(10**400),
    1e308,
)
INVALID: dict[str, Choice] = {
    "prompt": lambda rng: rng.choice(
        (
            (),
            ids(rng) * 50,
            (*ids(rng), N_VOCAB),
            (-1,),
            (1, "a"),
            (1.5,),
            (True,),
            5,
            None,
            ["a"],
            "a" * 100_000,
            foreign_messages(rng),
            (Message("no role!", "a"),),
            (Message("user", "a"), 5),
            (Message("user", 5),),  # type: ignore[arg-type]
            (Message("assistant", "a", ("b",)),),  # type: ignore[arg-type]
            (Message("assistant", "a", [5]),),  # type: ignore[arg-type]
        )
    ),
    "max_tokens": one_of(0, *WRONG_NUMBERS[1:6], "1", True),
    "stop": one_of(("",), "abc", ["a"], (5,), None),
    "n": one_of(0, 65, *WRONG_NUMBERS),
    "logprobs": one_of(1, None, "yes"),
    "top_logprobs": one_of(21, *WRONG_NUMBERS),
    "logit_bias": one_of(
        ((N_VOCAB, 1.0),), ((-1, 1.0),), ((5, float("nan")),), ((5, 2e3),), ((5,),), (5,), {5: 1}
    ),
    "context_shift": one_of(1, None),
    "n_keep": one_of(*WRONG_NUMBERS),
    "score_from": one_of(*WRONG_NUMBERS[1:]),
    "continue_final_message": one_of(1, None),
    "grammar": one_of("", "root ::= (", "root ::= \x00", 5, b"root", "a" * 10**6, 'root ::= x\nx ::= "a" x'),
    "json_schema": one_of("", "{", "[]", '{"type": "x"}', "[" * 10**5, {}, "\ud800", '{"$ref": "#"}'),
    "reply_start": one_of("detect", 1, True),
    "reasoning_budget": one_of(-1, *WRONG_NUMBERS[3:]),
    "chat_template_kwargs": one_of(None, [], "x", {1: 2}, {"messages": []}, {"x": float("nan")}),
    **{name: one_of(*WRONG_NUMBERS, "x") for name in SAMPLING if name != "seed"},
    "seed": one_of(*WRONG_NUMBERS[1:]),
}


def random_request(request_id: str, rng: random.Random) -> Request:
    """Most fields as they may be, and perhaps one or two as they may not. Raises what it refuses at once."""
    values = {name: VALID[name](rng) for name in rng.sample(sorted(VALID), rng.randrange(len(VALID)))}
    sampling = {name: SAMPLING[name](rng) for name in rng.sample(sorted(SAMPLING), rng.randrange(5))}
    values.setdefault("prompt", "a")
    wrong = rng.sample(sorted(INVALID), rng.choice((0, 1, 1, 2)))
    for name in [*wrong, *(("prompt",) if rng.random() < 0.1 else ())]:
        (sampling if name in SAMPLING else values)[name] = INVALID[name](rng)
    if values.get("context_shift") is True and values.get("max_tokens") in (None, 2**64):
        values["max_tokens"] = 2 * N_CONTEXT  # else it may go on for ever, as it was asked to
    return Request(request_id, sampling=SamplingParameters(**sampling), **values)


@pytest.fixture(scope="module", params=["streams", "pool"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """In streams, deterministic, replies must not change by a bit; in a pool most people's are decoded."""
    shape: dict[str, Any] = {"deterministic": True} if request.param == "streams" else {}
    options = ModelOptions(
        tiny_model(),
        n_threads=1,
        n_parallel=AT_ONCE,
        n_context=N_CONTEXT * AT_ONCE,
        n_ubatch=32,
        chat_template="deepseek-moe",
        observers=(ObserverOptions("logprobs"),),
        **shape,
    )
    with Engine.load(options) as loaded:
        assert loaded.info.n_vocab == N_VOCAB
        yield loaded


def told(events: Sequence[TokenEvent]) -> list[Any]:
    """What was told of each reply, in its order."""
    replies = [[event for event in events if event.index == index and not event.progress] for index in (0, 1)]
    return [[(e.text, e.token_id, e.logprob, e.finish_reason) for e in one] for one in replies]


def throw_requests(engine: Engine, n_rounds: int, seed: int) -> Counter[str]:
    """Rounds of requests at once, one of them with a known reply; some are cancelled in the middle."""
    expected = [list(engine.submit(Request("c", **values))) for values in CONTROLS]
    counts: Counter[str] = Counter()
    for number in range(n_rounds):
        rng = random.Random(f"{seed}:{number}")
        started: dict[str, Iterator[TokenEvent]] = {}
        control = rng.randrange(len(CONTROLS))
        place = rng.randrange(AT_ONCE)
        for index in range(AT_ONCE):
            name = f"{seed}:{number}:{index}"
            try:
                request = Request(name, **CONTROLS[control]) if index == place else random_request(name, rng)
                started[name] = engine.submit(request)
            except UsageError:
                counts["refused at once"] += 1
        victims = [name for name in started if rng.random() < 0.1 and name != f"{seed}:{number}:{place}"]
        for name in victims:
            engine.cancel(name)
        known = list(started.pop(f"{seed}:{number}:{place}"))
        for name, stream in started.items():
            counts[outcome(name, stream, victims)] += 1
        if engine.info.deterministic:
            assert told(known) == told(expected[control]), f"{seed}:{number}"
        elif control == 0:
            # In a pool the last digits depend on what else runs, and with them later tokens.
            assert told(known)[0][0][2] == pytest.approx(told(expected[0])[0][0][2], abs=0.02), name
        if not number % 20:
            engine.check()
    engine.check()
    return counts


def outcome(name: str, stream: Iterator[TokenEvent], victims: Sequence[str]) -> str:
    """How a request ended. Fails unless that is one of the ways a request may end."""
    try:
        events = list(stream)
    except DsmoeError as error:
        if len(str(error).splitlines()) > 3:
            pytest.fail(f"{name}: {error}")
        return f"refused: {type(error).__name__}" if isinstance(error, PromptError | UsageError) else "failed"
    assert events[-1].finish_reason is not None, name
    if any(event.finish_reason is FinishReason.CANCELLED for event in events):
        assert name in victims
    return "replied"


def test_every_field_is_checked() -> None:
    """Guards: a new field that takes anything, and is handed on to native code."""
    assert set(RANGES) == {field.name for field in fields(SamplingParameters)} == set(SAMPLING)
    assert {*REQUEST_RANGES, "prompt"} == {field.name for field in fields(Request)}
    assert {*VALID, *SAMPLING} == set(INVALID)


def test_random_requests(engine: Engine) -> None:
    """Guards: a field that ends the engine, hangs it, or changes what others are told."""
    counts = throw_requests(engine, 40, 1)
    assert counts["replied"] > 20
    assert counts["refused at once"] > 40
    assert counts["refused: PromptError"]
    assert counts["refused: UsageError"]


@pytest.mark.soak
def test_soak_random_requests(engine: Engine) -> None:
    """The same, thousands of times."""
    sys.stderr.write(f"\nrequests: {dict(throw_requests(engine, 600, 2))}\n")
