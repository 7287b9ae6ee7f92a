"""Lines with random damage, and requests with random fields: an error in words, or a request."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.batches import GREEDY, answer, batch, by_id
from support.fake_engine import FakeEngine
from support.models import tiny_model
from support.mutations import Outcome, damaged_json, damaged_text, try_mutants

from dsmoe_local.base.errors import DsmoeError
from dsmoe_local.base.progress import ignore
from dsmoe_local.batch.index import build_index
from dsmoe_local.batch.input_form import InputForm, parse_template
from dsmoe_local.batch.lines import kind_of
from dsmoe_local.batch.requests import request_of
from dsmoe_local.batch.sources import Source, Sources
from dsmoe_local.engine.interface import TextEngine
from dsmoe_local.engine.process.client import EngineClient
from dsmoe_local.engine.types import ModelOptions
from dsmoe_local.protocol.errors import describe
from dsmoe_local.protocol.fields import HONOURED, IGNORED, NEUTRAL

MESSAGES = [
    {"role": "user", "content": [{"type": "text", "text": "hé"}]},
    {"role": "assistant", "content": "b"},
]
LINES: list[dict[str, Any]] = [
    {
        "id": "a",
        "prompt": "text \U0001f680",
        "label": ["x", 1.5, None],
        "temperature": 0.5,
        "stop": ["a", "b"],
    },
    {"custom_id": 7, "messages": MESSAGES, "n_predict": -1, "seed": 2**40, "logit_bias": {"5": -1.5}},
    {
        "custom_id": "c",
        "method": "POST",
        "url": "/v1/chat/completions",
        "label": {"deep": [[1]]},
        "body": {
            "model": "m",
            "messages": MESSAGES,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "null"}},
            },
            "metadata": {"k": "v"},
            "logprobs": True,
            "top_logprobs": 2,
            "tools": [],
        },
    },
    {"sku": 9, "prompt": [1, 2, 3], "max_tokens": 4, "structured_outputs": {"grammar": 'root ::= "a"'}},
]
CSV = b'id,label,text\r\na,"one, ""two""\nthree",x\r\nb,,"y\xc3\xa9"\r\nc,3,z\n'
TEMPLATE = parse_template("{text}!")
JSON_FORMS = (
    InputForm(),
    InputForm(keep=("label", "metadata")),
    InputForm(id_field="sku", keep=("prompt",)),
    InputForm(template=parse_template("{prompt} {label}"), chat=True, keep=("label",)),
    InputForm(text=True),
)
CSV_FORMS = (InputForm(template=TEMPLATE, keep=("label",)), InputForm(template=TEMPLATE, id_field="label"))


def read_all(path: Path, form: InputForm) -> None:
    """Read every line as a run does. Raises the first error of a line."""
    errors: list[DsmoeError] = []
    with Sources([Source(path, form)]) as sources:
        index = build_index(sources, GREEDY, ignore, threading.Event())
        for turn in range(index.plan(ordered=True).n_lines):
            span, key = index.entry(turn)
            line = sources.line(span)
            assert line.key == key
            assert set(line.kept) == set(form.keep)
            json.dumps(line.kept, ensure_ascii=False, allow_nan=False).encode()
            try:
                request_of(line, GREEDY)
            except DsmoeError as error:
                json.dumps([describe(error), kind_of(error)], ensure_ascii=False).encode()
                errors.append(error)
    if errors:
        raise errors[0]


def mutated_lines(folder: Path, n: int, seed: int) -> Outcome:
    path = folder / "in.jsonl"
    whole = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)

    def read(rng: random.Random) -> None:
        if rng.random() < 0.2:
            content = damaged_text(whole, rng)
        else:
            line = damaged_json(rng.choice(LINES), rng)
            content = rng.choice((line, line + b"\n" + json.dumps(LINES[0]).encode()))
        path.write_bytes(content)
        read_all(path, rng.choice(JSON_FORMS))

    return try_mutants(read, n, seed)


def mutated_tables(folder: Path, n: int, seed: int) -> Outcome:
    path = folder / "in.csv"
    odd = (b'"', b'""', b"\r", b"\r\n", b",,", b'"\n', b"\xff", b"\x00", b"\xef\xbb\xbf", b"x" * 5000)

    def read(rng: random.Random) -> None:
        path.write_bytes(damaged_text(CSV, rng, odd))
        read_all(path, rng.choice(CSV_FORMS))

    return try_mutants(read, n, seed)


def test_mutated_lines(tmp_path: Path) -> None:
    """Guards: a line that ends the run with a traceback, or hangs it; an error that cannot be a record; a
    line that is read otherwise the second time.
    """
    mutated_lines(tmp_path, 1500, seed=1)


def test_mutated_tables(tmp_path: Path) -> None:
    """Guards: exceptions of the csv module, and errors that it hides."""
    mutated_tables(tmp_path, 700, seed=2)


@pytest.mark.soak
@pytest.mark.parametrize("mutated", [mutated_lines, mutated_tables])
def test_mutations_soak(tmp_path: Path, mutated: Callable[[Path, int, int], Outcome]) -> None:
    """Guards: faults that a thousand mutations do not find."""
    print(mutated(tmp_path, 50_000, 3))


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 3, 0.5, 1.5, -2.5, 1e9, 10**30, 2**31, 2**32),
    *("", "a", "none", "auto", 'root ::= "a"', "root ::= (", '{"type": "null"}', "\x00\u202e", "é" * 300),
    *([], ["a"], [""], [1, 2], [[]], [None], ["text"], [{"type": "text", "text": "x"}], list(range(50))),
    *({}, {"5": 1}, {"5": "x"}, {"a": {"b": [1]}}, {"type": "json_object"}, {"type": "text"}),
    *({"json": {"type": "integer"}}, {"type": "object", "properties": {"a": {"type": "null"}}}),
    *({"$ref": "#"}, {"allOf": [{}]}, {"pattern": "(a|b)*"}, {"grammar": "root ::= root"}),
)
PROMPTS: tuple[Any, ...] = ("The quick", "", "a" * 400, [1, 2, 3], ["one"], ["a", "b"], 5, None)
FOREIGN_IDS = ([10**9], [-1], [10**30])
CONVERSATIONS: tuple[Any, ...] = (
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": [{"type": "text", "text": "x"}]}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "    indented"}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user"}],
    [],
    "hi",
)
FIELDS = sorted(HONOURED.keys() - {"prompt", "messages"} | IGNORED | NEUTRAL.keys())
FIELDS_LIKELY = ("max_tokens", "temperature", "n", "stop", "seed", "logprobs", "top_logprobs", "json_schema")


def random_line(rng: random.Random, number: int, prompts: tuple[Any, ...]) -> dict[str, Any]:
    """Return a request with random fields, which may be valid alone but not together."""
    body: dict[str, Any] = {}
    if rng.random() < 0.5:
        body["prompt"] = rng.choice(prompts[:4]) if rng.random() < 0.7 else rng.choice(prompts)
    else:
        body["messages"] = rng.choice(CONVERSATIONS[:3]) if rng.random() < 0.7 else rng.choice(CONVERSATIONS)
    body["max_tokens"] = rng.randrange(1, 5)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        name = rng.choice(FIELDS if rng.random() < 0.5 else FIELDS_LIKELY)
        # Every other time a value that changes nothing.
        neutral = NEUTRAL.get(name, ())
        body[name] = rng.choice(neutral) if neutral and rng.random() < 0.5 else rng.choice(VALUES)
    if body.get("max_tokens") is None:
        body["max_tokens"] = 2
    if rng.random() < 0.5:
        return {"id": f"r{number}", **body}
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": f"r{number}", "method": "POST", "url": url, "body": body}


def random_requests(
    folder: Path, engine: TextEngine, n: int, seed: int, prompts: tuple[Any, ...] = PROMPTS
) -> Outcome:
    """Run a batch of `n` random requests and check that every one has a record."""
    rng = random.Random(seed)
    options = batch(folder, *(random_line(rng, number, prompts) for number in range(n)), form="openai")
    found = by_id(answer(engine, options))
    assert set(found) == {f"r{number}" for number in range(n)}
    errors = [record["error"] for record in found.values() if record["error"]]
    for error in errors:
        assert error["code"] not in ("engine_crash_error", "native_error"), error
        assert error["message"].startswith(f"line {error['line']}: ")
    return Outcome(n - len(errors), len(errors))


def test_random_requests(tmp_path: Path) -> None:
    """Guards: fields that end the batch; a test that refuses or accepts everything."""
    outcome = random_requests(tmp_path, FakeEngine(n_parallel=4), 600, seed=4)
    assert min(outcome.accepted, outcome.refused) > 100


@pytest.mark.soak
def test_random_requests_soak(tmp_path: Path) -> None:
    """Guards: requests that only the real engine crashes on."""
    with EngineClient.load(ModelOptions(tiny_model(), n_parallel=4, n_threads=1)) as engine:
        print(random_requests(tmp_path, engine, 10_000, 5, PROMPTS + FOREIGN_IDS))
        assert engine.crashes == 0
