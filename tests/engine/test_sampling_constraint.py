"""Grammars and schemas held against a real vocabulary; llama.cpp's grammar sampler and `jsonschema` judge."""

from __future__ import annotations

import ctypes
import json
import re
import threading
from typing import Any

import jsonschema
import llama_cpp  # noqa: TID251 - the oracle
import numpy as np
import pytest
from support import llama_oracle
from support.grammar_texts import belongs, gbnf
from support.models import smollm2

from dsmoe_local.base.errors import UsageError
from dsmoe_local.engine import native
from dsmoe_local.engine.engine import Engine
from dsmoe_local.engine.errors import EngineError
from dsmoe_local.engine.grammar.compile import compile_grammar
from dsmoe_local.engine.native.samplers import Candidates
from dsmoe_local.engine.sampling import TokenSampler, check_request, constraint
from dsmoe_local.engine.types import FinishReason, Message, ModelOptions, Request, SamplingParameters

GREEDY = SamplingParameters(temperature=0)
GROUPS = 'root ::= ([a-z]{0,9} [0-9]{0,9}){0,30} "."'
AFTER_GROUPS = rb"[a-z0-9]+\.?|\."
RULES = 50
WORDS = f"root ::= {' | '.join(f's{i}' for i in range(RULES))}\n" + "".join(
    f's{i} ::= [a-z] [a-z] "Z" "{i}"\n' for i in range(RULES)
)
AFTER_WORDS = rb"[a-z]{1,2}|[a-z]{2}Z[0-9]?"


@pytest.fixture(scope="module")
def rows() -> Any:
    """What a real model expects after each token of a text."""
    with llama_oracle.vocabulary(smollm2()) as vocabulary:
        prompt = vocabulary.encode(
            "There are 12 people in the room. Their names are Ann, Bob and 3 others, who"
        )
    return llama_oracle.logits(smollm2(), prompt)


def sampler_of(model: native.Model, context: native.Context, **values: Any) -> TokenSampler:
    request = Request("r", "", **values)
    return TokenSampler(model, context, request, 7, [], check_request(model, request))


class Theirs:
    """llama.cpp's own way: sample, test the token, sample again under the grammar if it is refused."""

    def __init__(self, model: native.Model, grammar: str, sampling: SamplingParameters) -> None:
        self._grammar = llama_cpp.llama_sampler_init_grammar(model.vocabulary, grammar.encode(), b"root")
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        stages = [llama_cpp.llama_sampler_init_greedy()]
        if sampling.temperature > 0:
            stages = [
                llama_cpp.llama_sampler_init_top_k(sampling.top_k),
                llama_cpp.llama_sampler_init_top_p(sampling.top_p, 1),
                llama_cpp.llama_sampler_init_min_p(sampling.min_p, 1),
                llama_cpp.llama_sampler_init_temp(sampling.temperature),
                llama_cpp.llama_sampler_init_dist(7),
            ]
        for stage in stages:
            llama_cpp.llama_sampler_chain_add(self._chain, stage)
        self.n_refused = 0

    def choose(self, row: Any) -> int:
        chosen = self._apply(row, [self._chain])[0]
        if self._apply(row, [self._grammar], only=chosen)[1] == -np.inf:
            self.n_refused += 1
            chosen = self._apply(row, [self._grammar, self._chain])[0]
        llama_cpp.llama_sampler_accept(self._grammar, chosen)
        return chosen

    def _apply(self, row: Any, samplers: list[Any], only: int | None = None) -> tuple[int, float]:
        ids = np.arange(len(row)) if only is None else np.array([only])
        data = np.zeros(len(ids), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        data["id"], data["logit"] = ids, row[ids]
        pointer = ctypes.cast(data.ctypes.data, llama_cpp.llama_token_data_p)
        array = llama_cpp.llama_token_data_array(pointer, len(ids), -1, False)
        for sampler in samplers:
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
        return int(data["id"][max(array.selected, 0)]), float(data["logit"][0])

    def close(self) -> None:
        llama_cpp.llama_sampler_free(self._grammar)
        llama_cpp.llama_sampler_free(self._chain)


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParameters(),
        SamplingParameters(temperature=1.5, top_k=5, top_p=1, min_p=0),
        SamplingParameters(temperature=2, top_k=200, top_p=0.99, min_p=0.001),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= [a-z ]+ "." root?',
        'root ::= "{" (" "? "\\"" [a-zA-Z]+ "\\": " [0-9]+ ","?)* "}"',
        'root ::= ([A-Z0-9] [^a-z\\x80-\\U0010FFFF]{0,3} | " ")+',
        'root ::= [0-9]{1,3} (", " [0-9]{1,3})*',
    ],
)
def test_choices_equal_those_of_llama_cpp(
    model: native.Model, context: native.Context, rows: Any, grammar: str, sampling: SamplingParameters
) -> None:
    """Guards: a permitted token overlooked, a forbidden one taken, fewer than top-k to draw from."""
    ours = sampler_of(model, context, sampling=sampling, grammar=grammar)
    theirs = Theirs(model, grammar, sampling)
    text = b""
    for row in rows:
        chosen = ours.choose(row).token_id
        assert chosen == theirs.choose(row), text
        if model.ends(chosen):
            break
        text += model.piece(chosen)
    assert theirs.n_refused > 0
    ours.close()
    theirs.close()


@pytest.mark.parametrize("temperature", [0, 1, 3])
def test_replies_of_noise_keep_the_grammar(
    model: native.Model, context: native.Context, temperature: float
) -> None:
    """Guards: an end before the grammar is complete, none after it; tokens without text taken as nothing."""
    grammar = 'root ::= "<" [^>]{0,40} ">" ("é" | "中文" | "\\n"){1,3}'
    root = gbnf(grammar)
    rng = np.random.default_rng(1)
    controls = [i for i in range(model.n_vocab) if not model.piece(i)]
    for top_k in (0, 10):
        sampling = SamplingParameters(temperature=temperature, top_k=top_k, top_p=1, min_p=0)
        sampler = sampler_of(model, context, sampling=sampling, grammar=grammar)
        text = b""
        for _ in range(100):
            row = rng.normal(0, 3, model.n_vocab).astype(np.float32)
            row[controls] += 15
            chosen = sampler.choose(row).token_id
            if model.ends(chosen):
                break
            assert chosen not in controls
            text += model.piece(chosen)
        assert model.ends(chosen)
        assert belongs(root, text), text
        sampler.close()


def test_what_no_token_can_write(model: native.Model, context: native.Context) -> None:
    """Guards: one of the forbidden tokens taken where none is permitted."""
    sampler = sampler_of(model, context, sampling=GREEDY, grammar='root ::= "a\\x16"')
    row = np.zeros(model.n_vocab, np.float32)
    sampler.choose(row)
    with pytest.raises(EngineError, match="none of the model's tokens"):
        sampler.choose(row)


def test_a_ban_yields_to_the_grammar(model: native.Model, context: native.Context) -> None:
    """Guards: a reply without any way on because the only token left was banned."""
    (yes,) = model.tokenize(b"yes", special=False)
    pieces = [(i, -1000.0) for i in range(model.n_vocab) if model.piece(i)[:1] == b"y"]
    sampler = sampler_of(model, context, grammar='root ::= "yes"', logit_bias=tuple(pieces), sampling=GREEDY)
    row = np.zeros(model.n_vocab, np.float32)
    row[yes] = 1
    assert sampler.choose(row).token_id == yes
    assert model.ends(sampler.choose(row).token_id)


@pytest.mark.timeout(120)
def test_hostile_grammars_take_no_hold_of_the_engine(model: native.Model, context: native.Context) -> None:
    """Guards: minutes spent on one token of one request while all others wait."""
    many = " | ".join(f"s s{i}" for i in range(30))
    rules = "".join(f's{i} ::= s "a"? s | "a"\n' for i in range(30))
    sampler = sampler_of(model, context, sampling=GREEDY, grammar=f'root ::= s\ns ::= {many} | "a"\n{rules}')
    row = np.zeros(model.n_vocab, np.float32)
    row[[i for i in range(model.n_vocab) if model.ends(i)]] = -5

    def choose_on() -> None:
        for _ in range(1000):
            sampler.choose(row)

    with pytest.raises(EngineError, match="became too complex"):
        choose_on()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grammar": "root ::= ("}, "line 1"),
        ({"json_schema": '{"not": {}}'}, '"not"'),
        ({"json_schema": "{"}, "JSON schema cannot be read"),
        ({"grammar": "\ud800"}, "surrogate"),
        ({"grammar": ""}, "root"),
        ({"json_schema": ""}, "JSON schema cannot be read"),
    ],
)
def test_check_request(model: native.Model, values: dict[str, Any], message: str) -> None:
    """Guards: a request that is scheduled and then fails in the middle of a step."""
    with pytest.raises(UsageError, match=message):
        check_request(model, Request("r", "x", **values))


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 16},
        "population": {"type": "integer", "minimum": 1000, "maximum": 99_999_999},
        "rivers": {"type": "array", "items": {"enum": ["Seine", "Marne"]}, "minItems": 1, "maxItems": 2},
        "mood": {"enum": ["gay", "grey"]},
    },
    "required": ["name", "population", "rivers"],
    "additionalProperties": False,
}


def test_a_real_model_writes_what_the_schema_says() -> None:
    """Guards: a reply that is cut off, or valid in bytes but not as text; requests at once that mix."""
    question = (Message("user", "Tell me about Paris, as JSON."),)
    with Engine.load(ModelOptions(smollm2(), n_context=2048, n_threads=1, n_parallel=2)) as engine:
        streams = [
            engine.submit(
                Request(
                    f"{temperature}",
                    question,
                    SamplingParameters(temperature=temperature, seed=1),
                    json_schema=json.dumps(SCHEMA),
                    max_tokens=250,
                    logprobs=True,
                )
            )
            for temperature in (0, 1.2)
        ]
        for stream in streams:
            events = list(stream)
            assert events[-1].finish_reason is FinishReason.STOP
            reply = json.loads("".join(event.text for event in events))
            jsonschema.Draft202012Validator(SCHEMA).validate(reply)
            assert all(event.logprob is not None for event in events[:-1])
        for n in (1, 3):
            failing = engine.submit(Request("bad", "x", grammar="root ::= (", n=n))
            with pytest.raises(UsageError, match="line 1"):
                next(failing)
            assert list(failing) == []
        events = list(engine.submit(Request("good", question, GREEDY, grammar='root ::= "Oui" | "Non"')))
        assert "".join(event.text for event in events) in ("Oui", "Non")


def test_grammars_are_prepared_while_others_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: everybody waiting between two steps for a grammar that was prepared once, and forgotten."""
    prepared: list[str] = []
    one_more, blocked, go_on = threading.Semaphore(0), threading.Event(), threading.Event()

    def prepare(*, grammar: str | None, json_schema: str | None) -> str:
        prepared.append(threading.current_thread().name)
        one_more.release()
        return compile_grammar(grammar=grammar, json_schema=json_schema)

    def block() -> None:
        blocked.set()
        assert go_on.wait(60)

    monkeypatch.setattr(constraint, "compile_grammar", prepare)
    with Engine.load(ModelOptions(smollm2(), n_context=512, n_threads=1, n_parallel=4)) as engine:
        engine.after_step = block
        first = engine.submit(Request("first", "x", GREEDY, max_tokens=2))
        assert blocked.wait(60)
        wanted = [str(100 + i) for i in range(40)]
        held = [engine.submit(Request(text, "x", GREEDY, grammar=f'root ::= "{text}"')) for text in wanted]
        for _ in wanted:
            assert one_more.acquire(timeout=60)
        go_on.set()
        list(first)
        assert ["".join(event.text for event in stream) for stream in held] == wanted
    assert len(prepared) == len(wanted)
    assert not {"dsmoe-engine"} & set(prepared)


@pytest.mark.parametrize("top_k", [1, 40, 1000])
@pytest.mark.parametrize(("grammar", "permitted"), [(GROUPS, AFTER_GROUPS), (WORDS, AFTER_WORDS)])
def test_a_draw_chooses_from_all_that_is_permitted(
    grammar: str,
    permitted: bytes,
    top_k: int,
    model: native.Model,
    context: native.Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guards: top-k under a costly grammar that leaves permitted tokens out, or says that there are none
    where the likeliest ones are all forbidden.
    """
    pieces = [model.piece(i) for i in range(model.n_vocab)]
    allowed = np.array([bool(re.fullmatch(permitted, piece)) for piece in pieces])
    row = np.random.default_rng(5).normal(0, 3, model.n_vocab).astype(np.float32)
    row[[i for i, piece in enumerate(pieces) if re.fullmatch(rb"[a-z]{2}[^Z].*", piece)]] += 20
    row[~allowed] += 30
    drawn: list[int] = []

    def fill(self: Candidates, logits: Any, ids: Any = None) -> None:
        drawn[:] = range(model.n_vocab) if ids is None else ids.tolist()
        real_fill(self, logits, ids)

    real_fill = Candidates.fill
    monkeypatch.setattr(Candidates, "fill", fill)
    request = Request("r", "", SamplingParameters(top_k=top_k), grammar=grammar)
    sampler = TokenSampler(model, context, request, 7, [], check_request(model, request))
    chosen = sampler.choose(row).token_id
    sampler.close()
    ids = np.flatnonzero(allowed)
    expected = ids[np.argsort(-row[ids], kind="stable")][:top_k].tolist()
    assert sorted(drawn) == sorted(expected)
    assert chosen in expected
