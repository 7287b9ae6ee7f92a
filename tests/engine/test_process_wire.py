"""What crosses between the engine's process and its client: everything exactly, nothing else."""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsmoe_local.base import errors as base_errors
from dsmoe_local.base import progress
from dsmoe_local.base.errors import DsmoeError, InterruptedRunError, MissingExtraError, UsageError
from dsmoe_local.engine import errors as engine_errors
from dsmoe_local.engine.errors import EngineCrashError, EngineError, PromptError
from dsmoe_local.engine.process import wire
from dsmoe_local.engine.types import (
    FinishReason,
    Message,
    ModelInfo,
    ModelOptions,
    Observation,
    ObserverOptions,
    Prompt,
    PromptProgress,
    Request,
    SamplingParameters,
    TokenEvent,
    TokenLogprob,
    Usage,
)


def crossed(value: Any) -> Any:
    """`value` as the other side reads it."""
    message = wire.receive(io.BytesIO(wire.pack(["x", value])))
    assert message is not None
    return message[1]


ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(0, 2**40)
IDS = st.lists(st.integers(0, 2**31), max_size=5).map(tuple)
MESSAGES = st.builds(Message, ANY_TEXT, ANY_TEXT, IDS)
PROMPTS = ANY_TEXT | st.lists(MESSAGES, min_size=1, max_size=3).map(tuple) | IDS
SAMPLING = st.builds(
    SamplingParameters,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    mirostat=st.sampled_from([0, 1, 2]),
    seed=st.none() | st.integers(0, 2**32 - 2),
)
CONSTRAINTS = st.sampled_from(
    [
        {"n": 64},
        {"score_from": 2**40, "max_tokens": 1},
        {"grammar": 'root ::= "\u2028"'},
        {"json_schema": '{"type": "number"}'},
    ]
)
REQUESTS = st.builds(
    lambda constraint, **values: Request(**values | constraint),
    CONSTRAINTS,
    id=ANY_TEXT,
    prompt=PROMPTS,
    sampling=SAMPLING,
    max_tokens=st.none() | st.integers(1, 2**31),
    stop=st.lists(ANY_TEXT.filter(bool), max_size=3).map(tuple),
    logprobs=st.booleans(),
    top_logprobs=st.integers(0, 20),
    logit_bias=st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1000, 1000)), max_size=3).map(tuple),
    context_shift=st.booleans(),
    n_keep=COUNTS,
)
EVENTS = (
    st.builds(
        TokenEvent,
        request_id=st.just("r"),
        text=ANY_TEXT,
        seconds=FLOATS,
        token_id=st.none() | COUNTS,
        logprob=st.none() | FLOATS,
        progress=st.none() | st.builds(PromptProgress, COUNTS, COUNTS),
        finish_reason=st.none() | st.sampled_from(FinishReason),
        usage=st.none() | st.builds(Usage, COUNTS, COUNTS, COUNTS, FLOATS, FLOATS, st.none() | COUNTS),
        index=st.integers(0, 63),
        alternatives=st.lists(st.builds(TokenLogprob, COUNTS, ANY_TEXT, FLOATS), max_size=3).map(tuple),
        held=st.booleans(),
    )
    | st.builds(
        TokenEvent, st.just("r"), ANY_TEXT, FLOATS, COUNTS, dropped=st.integers(1, 9), dropped_from=COUNTS
    )
    | st.builds(TokenEvent, st.just("r"), ANY_TEXT, FLOATS, COUNTS, held=st.just(True))
    | st.builds(
        TokenEvent,
        st.just("r"),
        ANY_TEXT,
        FLOATS,
        prompt_tokens=st.just(((TokenLogprob(1, "a", -0.5), TokenLogprob(2, "b", -0.7)),)),
        prompt_start=COUNTS,
    )
)
PATHS = st.sampled_from(["m.gguf", "/a b/ü.gguf", "half \udcff name.gguf"]).map(Path)
OBSERVERS = st.builds(
    ObserverOptions,
    ANY_TEXT,
    st.lists(st.tuples(ANY_TEXT, ANY_TEXT | COUNTS | FLOATS | st.booleans()), max_size=3).map(tuple),
)
OPTIONS = st.builds(
    ModelOptions,
    path=PATHS,
    n_context=st.none() | COUNTS,
    unified=st.none() | st.booleans(),
    tensor_overrides=st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=2).map(tuple),
    devices=st.none() | st.lists(ANY_TEXT, max_size=2).map(tuple),
    observers=st.lists(OBSERVERS, max_size=2).map(tuple),
)
INFOS = st.builds(ModelInfo, path=PATHS, name=ANY_TEXT, template=st.none() | ANY_TEXT)


@settings(max_examples=150)
@given(REQUESTS)
def test_requests_cross_exactly(request: Request) -> None:
    """Guards: a field that is lost or mixed up, a message read as token ids, half a surrogate pair."""
    back = wire.from_plain(Request, crossed(wire.to_plain(request)))
    assert back == request
    assert repr(back) == repr(request)  # also the types of numbers, and tuples that are lists


@settings(max_examples=150)
@given(EVENTS)
def test_events_cross_exactly(event: TokenEvent) -> None:
    """Guards: the short form of events taken where something would be lost."""
    plain = crossed(wire.event_to_plain(7, event))
    assert plain[0] == 7
    assert len(plain) > wire.END_LENGTH
    assert repr(wire.event_from_plain("r", plain)) == repr(event)


@settings(max_examples=60)
@given(OPTIONS | INFOS)
def test_options_and_model_cross_exactly(value: ModelOptions | ModelInfo) -> None:
    """Guards: a path that is not UTF-8 refused, pairs that come back as lists."""
    assert repr(wire.from_plain(type(value), crossed(wire.to_plain(value)))) == repr(value)


@settings(max_examples=30)
@given(PROMPTS)
def test_prompts_cross_exactly(prompt: Any) -> None:
    """Guards: the three kinds of prompt told apart wrongly."""
    assert wire.from_plain(Prompt, crossed(wire.to_plain(prompt))) == prompt


@pytest.mark.parametrize(
    "event",
    [
        progress.Started("loading", 2**40, 1, "files"),
        progress.Advanced(5, "blk.0"),
        progress.Finished("loading"),
        progress.Note("\x1b[31m"),
    ],
)
def test_progress_crosses_exactly(event: progress.Event) -> None:
    """Guards: a kind of progress that ends the load."""
    assert wire.progress_from_plain(crossed(wire.progress_to_plain(event))) == event


def tree(kind: type[DsmoeError]) -> Iterator[type[DsmoeError]]:
    """The errors that the engine may raise, from the root down."""
    if kind.__module__ in (base_errors.__name__, engine_errors.__name__):
        yield kind
        for below in kind.__subclasses__():
            yield from tree(below)


@pytest.mark.parametrize(
    "kind", [kind for kind in tree(DsmoeError) if not issubclass(kind, EngineCrashError)]
)
def test_every_error_crosses_as_itself(kind: type[DsmoeError]) -> None:
    """Guards: a new kind of error that callers can no longer catch by its class."""
    if kind is MissingExtraError:
        error: DsmoeError = MissingExtraError("pickle", "torch", ".bin files")
    elif kind is InterruptedRunError:
        error = InterruptedRunError("stopped", signal_number=15, remedy="again")
    else:
        error = kind("what\n1", where=Path("where") / "é", remedy="remedy")
    back = wire.error_from_plain(crossed(wire.error_to_plain(error)))
    assert type(back) is kind
    assert (str(back), back.exit_code) == (str(error), error.exit_code)
    assert (back.what, back.where, back.remedy) == (error.what, error.where, error.remedy)


def test_other_errors_cross_as_the_nearest_kind() -> None:
    """Guards: a bug, or an error class of another package, that is not reported."""

    class FinerError(PromptError):
        """Not in the table."""

    assert type(wire.error_from_plain(crossed(wire.error_to_plain(FinerError("x"))))) is PromptError
    back = wire.error_from_plain(crossed(wire.error_to_plain(KeyError("k"))))
    assert type(back) is EngineError
    assert "internal error" in back.what
    assert "KeyError: 'k'" in back.what


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1j, b"x", object()])
def test_what_json_has_not_is_refused(value: object) -> None:
    """Guards: NaN that the other side reads as a number; pickled objects."""
    with pytest.raises(EngineError, match="cannot be sent"):
        wire.pack(["x", value])


def frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


@pytest.mark.parametrize(
    "body",
    [
        b"[NaN]",
        b"[-Infinity]",
        b"{}",
        b"[]",
        b"",
        b"\xff",
        b'["x"',
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_frames_that_are_no_messages(body: bytes) -> None:
    """Guards: a malformed frame that ends the reader's thread with an unexpected error."""
    with pytest.raises(wire.WireError):
        wire.receive(io.BytesIO(frame(body)))


@given(st.integers(0, 20))
def test_half_a_frame_is_the_end(cut: int) -> None:
    """Guards: a side that died while it wrote taken for one that is broken."""
    whole = wire.pack(["events", [[1, "a", 0.5, 3]]])
    assert wire.receive(io.BytesIO(whole[:cut])) is None


def test_a_length_that_is_nonsense() -> None:
    """Guards: gigabytes reserved for what a broken side calls a length."""
    with pytest.raises(wire.WireError, match="4294967295 bytes"):
        wire.receive(io.BytesIO(b"\xff" * 8))


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Request, {"id": "r"}),
        (Request, ["r", "x"]),
        (Request, None),
        (Request, {"id": "r", "prompt": "x", "n": True}),
        (TokenEvent, ["r", "t", 0.0, 1, None, None, "no reason"]),
        (TokenEvent, ["r", 5, 0.0]),
        (TokenEvent, ["r", "t", 0.0, 1, None, None, None, None, 0, [], 0, 0, False, "", False, "more"]),
        (TokenEvent, ["r", "t", 0.0, None, None, None, "\ud800"]),
        (ModelOptions, {"path": 5}),
        (ModelOptions, {"path": "m", "devices": "cpu"}),
        (int, True),
        (int, 1.0),
        (int, "\ud800"),
        (float, "1"),
        (tuple[int, ...], "12"),
        (tuple[int, ...], [1, None]),
        (tuple[str, ...], "abc"),
        (Message, {"role": "user", "content": None}),
        (Message, {"role": "user", "content": "x", "token_ids": [True]}),
        (Prompt, [1, "x"]),
        (Prompt, {"a": 1}),
        (Observation, []),
    ],
)
def test_values_of_the_wrong_shape(kind: Any, value: Any) -> None:
    """Guards: a half-understood value, which somebody far from here trips over; any error but the one that is
    expected.
    """
    with pytest.raises(wire.WireError):
        wire.from_plain(kind, value)


def test_what_a_type_refuses_is_its_own_error() -> None:
    """Guards: a request out of range reported as a broken connection."""
    plain = json.loads(json.dumps(wire.to_plain(Request("r", "x"))))
    plain["sampling"]["temperature"] = -1
    with pytest.raises(UsageError, match="temperature"):
        wire.from_plain(Request, plain)


@pytest.mark.parametrize("read", [wire.error_from_plain, wire.progress_from_plain])
def test_only_the_table_becomes_objects(read: Any) -> None:
    """Guards: a name from the other side that is looked up anywhere but in the table."""
    with pytest.raises(wire.WireError):
        read(["SystemExit", "a", "b", "c", 1] if read is wire.error_from_plain else ["SystemExit", []])
